// Ports of a banked buffer: one word a bank and cycle. Lines are served in turn, beginning
// with `first`; with MULTICAST a line that asks for the word just read gets it as well.
// Combinational; `reads` counts the words read in this cycle.
module bank_arbiter #(
    parameter LINES = 4,
    parameter BANKS = 4,
    parameter ADDRESS = 24,
    parameter MULTICAST = 1
) (
    input      [LINES-1:0]         request,
    input      [LINES*ADDRESS-1:0] address,
    input      [15:0]              first,
    output reg [LINES-1:0]         grant,
    output reg [15:0]              reads
);
    reg [BANKS-1:0]         taken;
    reg [BANKS*ADDRESS-1:0] word;
    reg [ADDRESS-1:0]       wanted;
    integer step, line, bank;

    always @* begin
        grant = 0;
        taken = 0;
        reads = 0;
        word = 0;
        for (step = 0; step < LINES; step = step + 1) begin
            line = first + step;
            if (line >= LINES) line = line - LINES;
            wanted = address[line*ADDRESS +: ADDRESS];
            bank = wanted % BANKS;
            if (request[line]) begin
                if (!taken[bank]) begin
                    taken[bank] = 1;
                    word[bank*ADDRESS +: ADDRESS] = wanted;
                    grant[line] = 1;
                    reads = reads + 1;
                end else if (MULTICAST && word[bank*ADDRESS +: ADDRESS] == wanted) begin
                    grant[line] = 1;
                end
            end
        end
    end
endmodule
