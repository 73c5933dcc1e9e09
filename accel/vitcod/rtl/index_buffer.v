// IdxBuf: entries of the index stream in the order of their arrival. Room for `capacity`
// entries; it is refilled in every cycle as far as there is room, and gives at most PORTS
// entries a cycle to the lines, which are served in turn from `first` on. Which slot is
// reused is not modelled, how many are taken is.
module index_buffer #(
    parameter LINES = 4,
    parameter PORTS = 2,
    parameter ENTRIES = 1024,
    parameter ADDRESS = 24
) (
    input                          clk,
    input                          reset,
    input      [ADDRESS-1:0]       total,
    input      [ADDRESS-1:0]       capacity,
    input      [LINES-1:0]         wants,
    input      [LINES*ADDRESS-1:0] place,    // of each line's next entry in the stream
    input      [15:0]              first,
    output reg [LINES-1:0]         grant,
    output     [LINES*16-1:0]      entry,
    output     [ADDRESS-1:0]       on_chip   // entries of the stream that have arrived
);
    reg [15:0]        stream [0:ENTRIES-1];
    reg [ADDRESS-1:0] given;
    reg [15:0]        now;
    integer step, line;
    genvar l;

    assign on_chip = given + capacity < total ? given + capacity : total;

    generate
        for (l = 0; l < LINES; l = l + 1) begin : read
            assign entry[l*16 +: 16] = stream[place[l*ADDRESS +: ADDRESS]];
        end
    endgenerate

    always @* begin
        grant = 0;
        now = 0;
        for (step = 0; step < LINES; step = step + 1) begin
            line = first + step;
            if (line >= LINES) line = line - LINES;
            if (wants[line] && now < PORTS && place[line*ADDRESS +: ADDRESS] < on_chip) begin
                grant[line] = 1;
                now = now + 1;
            end
        end
    end

    always @(posedge clk) given <= reset ? 0 : given + now;
endmodule
