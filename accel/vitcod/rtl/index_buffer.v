// IdxBuf: entries of the index stream in the order of their arrival. Room for `capacity` bytes of
// it; it is refilled in every cycle as far as there is room, and gives at most PORTS entries a
// cycle to the lines, which are served in turn from `first` on. An entry can be read once the
// byte with which it is whole is there; reading it frees `frees` bytes (none of an entry that
// shares its last byte with the one behind it, or takes no bits). Which slot is reused is not
// modelled, how many bytes are taken is.
module index_buffer #(
    parameter LINES = 4,
    parameter PORTS = 2,
    parameter ENTRIES = 1024,
    parameter ADDRESS = 24
) (
    input                          clk,
    input                          reset,
    input      [ADDRESS-1:0]       total,    // bytes of the stream
    input      [ADDRESS-1:0]       capacity, // bytes
    input      [LINES-1:0]         wants,
    input      [LINES*ADDRESS-1:0] place,    // of each line's next entry in the stream
    input      [15:0]              first,
    output reg [LINES-1:0]         grant,
    output     [LINES*16-1:0]      entry
);
    reg [15:0]        stream [0:ENTRIES-1];
    reg [ADDRESS-1:0] whole  [0:ENTRIES-1];
    reg [15:0]        frees  [0:ENTRIES-1];
    reg [ADDRESS-1:0] given, freed;
    reg [15:0]        now;
    integer step, line;
    genvar l;

    wire [ADDRESS-1:0] on_chip = given + capacity < total ? given + capacity : total;

    generate
        for (l = 0; l < LINES; l = l + 1) begin : read
            assign entry[l*16 +: 16] = stream[place[l*ADDRESS +: ADDRESS]];
        end
    endgenerate

    always @* begin
        grant = 0;
        now = 0;
        freed = 0;
        for (step = 0; step < LINES; step = step + 1) begin
            line = first + step;
            if (line >= LINES) line = line - LINES;
            if (wants[line] && now < PORTS && whole[place[line*ADDRESS +: ADDRESS]] <= on_chip)
            begin
                grant[line] = 1;
                now = now + 1;
                freed = freed + frees[place[line*ADDRESS +: ADDRESS]];
            end
        end
    end

    always @(posedge clk) given <= reset ? 0 : given + freed;
endmodule
