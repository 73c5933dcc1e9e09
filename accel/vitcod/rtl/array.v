// The MAC lines with their buffers: both engines, one product of one head's tile at a time, and
// the lists of rows, which SDDMM of a unit writes and SpMM of that unit reads, for two units.
//
// The schedule (pieces of each line, index stream) is loaded before `reset` falls. Buffers
// are filled from outside at `*_there` tokens; the tokens themselves are already in memory.
// The softmax unit is outside: it says from which cycle on a row's probabilities are there.
module array #(
    parameter LINES = 4,
    parameter WORDS = 2,
    parameter OPERAND_BANKS = 4,
    parameter KEY_BANKS = 4,
    parameter OUTPUT_BANKS = 4,
    parameter INDEX_PORTS = 2,
    parameter PIECES = 1024,
    parameter ENTRIES = 4096,
    parameter TOKENS = 256
) (
    input                  clk,
    input                  reset,
    input                  spmm,
    input                  lists,          // one index stream serves both products
    input                  unit,           // which of the two in flight
    input      [31:0]      cycle,
    input      [15:0]      turn_line,      // the line that is served first
    input      [23:0]      index_total,    // bytes
    input      [23:0]      index_capacity,
    input      [15:0]      operand_base,   // number of the product's first token
    input      [15:0]      operands_there,
    input      [15:0]      vector_base,
    input      [15:0]      vectors_there,
    output                 done
);
    localparam A = 24;

    // Memories that the test bench loads.
    reg [15:0] piece_vector [0:PIECES-1];
    reg [15:0] piece_first  [0:PIECES-1];
    reg [15:0] piece_length [0:PIECES-1];
    reg [15:0] piece_round  [0:PIECES-1];  // of the sparser engine
    reg [15:0] piece_dense  [0:PIECES-1];
    reg [15:0] piece_place  [0:PIECES-1];  // in the lists of the unit
    reg [31:0] row_ready    [0:TOKENS-1];  // first cycle of a row's probabilities
    reg [15:0] line_piece   [0:LINES];
    reg [23:0] line_entry   [0:LINES];
    reg [23:0] entry_place  [0:ENTRIES-1]; // of each line's entries in the index stream
    reg [63:0] operand_mem  [0:TOKENS*WORDS-1];
    reg [63:0] key_mem      [0:TOKENS*WORDS-1];
    reg [7:0]  weight_mem   [0:TOKENS*TOKENS-1];
    reg signed [31:0] output_mem [0:TOKENS*WORDS*8-1];

    // Two units' lists, and where the next key of each row's list goes.
    reg [15:0] list_mem [0:2*ENTRIES-1];
    reg [15:0] list_end [0:2*TOKENS-1];

    wire [LINES-1:0]   index_wanted, index_grant, operand_wanted, operand_grant;
    wire [LINES-1:0]   key_wanted, key_grant, drain_wanted, drain_grant;
    wire [LINES-1:0]   working, in_flight, next_in_round, score_valid, sum_valid, listing;
    wire [LINES*16-1:0] list_row, list_key;
    wire [LINES*A-1:0] index_place, operand_address, key_address, drain_address, sum_address;
    wire [LINES*16-1:0] index_entry, score_row, score_vector;
    wire [LINES*32-1:0] score;
    wire [LINES*256-1:0] sum_word;
    wire [15:0] operand_reads, key_reads, drains;
    reg  [15:0] turn;
    integer     l, i, s, w;

    assign done = !(|working) && !(|in_flight);

    // Lockstep: the next round begins when no line has work of this one.
    always @(posedge clk) turn <= reset ? 0 : |next_in_round ? turn : turn + 1;

    genvar g;
    generate
        for (g = 0; g < LINES; g = g + 1) begin : lines
            wire [15:0] piece, next_piece, preloading, operand, used;
            wire [A-1:0] fetched;
            wire next_there = next_piece != line_piece[g+1];
            reg  [63:0] operand_word, key_word;
            assign list_row[g*16 +: 16] = operand;
            assign list_key[g*16 +: 16] = piece_vector[piece];
            assign index_place[g*A +: A] = entry_place[fetched];
            assign next_in_round[g] = next_there && !piece_dense[next_piece][0]
                                      && piece_round[next_piece] == turn;
            always @(posedge clk) begin
                if (operand_grant[g]) operand_word <= operand_mem[operand_address[g*A +: A]];
                if (key_grant[g]) key_word <= key_mem[key_address[g*A +: A]];
            end
            mac_line #(.WORDS(WORDS), .ADDRESS(A)) line (
                .clk(clk), .reset(reset), .spmm(spmm),
                .first_piece(line_piece[g]), .last_piece(line_piece[g+1]),
                .first_entry(line_entry[g]), .last_entry(line_entry[g+1]),
                .piece(piece), .next_piece(next_piece), .preloading(preloading),
                .dense(piece_dense[piece][0]), .vector(piece_vector[piece]),
                .first_operand(piece_first[piece]), .length(piece_length[piece]),
                .held(!piece_dense[piece][0] && piece_round[piece] > turn
                      || spmm && cycle < row_ready[piece_vector[piece]]),
                .listed(lists && spmm), .used(used), .listing(listing[g]),
                .list_entry(list_mem[unit*ENTRIES + piece_place[piece] + used]),
                .index_wanted(index_wanted[g]), .fetched(fetched),
                .index_grant(index_grant[g]), .index_entry(index_entry[g*16 +: 16]),
                .operand_base(operand_base), .operands_there(operands_there),
                .operand_wanted(operand_wanted[g]),
                .operand_address(operand_address[g*A +: A]), .operand_grant(operand_grant[g]),
                .operand_word(operand_word), .operand(operand),
                .weight(weight_mem[piece_vector[piece]*TOKENS + operand]),
                .preload_vector(vector_base + piece_vector[preloading]),
                .vectors_there(vectors_there),
                .key_wanted(key_wanted[g]), .key_address(key_address[g*A +: A]),
                .key_grant(key_grant[g]), .key_word(key_word),
                .drain_wanted(drain_wanted[g]), .drain_address(drain_address[g*A +: A]),
                .drain_grant(drain_grant[g]),
                .score_valid(score_valid[g]), .score_row(score_row[g*16 +: 16]),
                .score_vector(score_vector[g*16 +: 16]), .score(score[g*32 +: 32]),
                .sum_valid(sum_valid[g]), .sum_address(sum_address[g*A +: A]),
                .sum_word(sum_word[g*256 +: 256]),
                .working(working[g]), .in_flight(in_flight[g])
            );
        end
    endgenerate

    index_buffer #(.LINES(LINES), .PORTS(INDEX_PORTS), .ENTRIES(ENTRIES), .ADDRESS(A)) idxbuf (
        .clk(clk), .reset(reset), .total(index_total), .capacity(index_capacity),
        .wants(index_wanted), .place(index_place), .first(turn_line),
        .grant(index_grant), .entry(index_entry)
    );
    bank_arbiter #(.LINES(LINES), .BANKS(OPERAND_BANKS), .ADDRESS(A)) operand_ports (
        .request(operand_wanted), .address(operand_address), .first(turn_line),
        .grant(operand_grant), .reads(operand_reads)
    );
    bank_arbiter #(.LINES(LINES), .BANKS(KEY_BANKS), .ADDRESS(A)) key_ports (
        .request(key_wanted), .address(key_address), .first(turn_line),
        .grant(key_grant), .reads(key_reads)
    );
    bank_arbiter #(.LINES(LINES), .BANKS(OUTPUT_BANKS), .ADDRESS(A), .MULTICAST(0)) output_ports (
        .request(drain_wanted), .address(drain_address), .first(turn_line),
        .grant(drain_grant), .reads(drains)
    );

    // Keys of scores into the lists of their rows, of one cycle in the order of the lines' turn.
    always @(posedge clk)
        for (s = 0; s < LINES; s = s + 1) begin
            w = turn_line + s < LINES ? turn_line + s : turn_line + s - LINES;
            if (lists && listing[w] && !reset) begin
                list_mem[unit*ENTRIES + list_end[unit*TOKENS + list_row[w*16 +: 16]]]
                    = list_key[w*16 +: 16];
                list_end[unit*TOKENS + list_row[w*16 +: 16]]
                    = list_end[unit*TOKENS + list_row[w*16 +: 16]] + 1;
            end
        end

    // The output buffer adds what drains into it.
    always @(posedge clk)
        for (l = 0; l < LINES; l = l + 1)
            if (sum_valid[l])
                for (i = 0; i < 8; i = i + 1)
                    output_mem[sum_address[l*A +: A]*8 + i]
                        <= output_mem[sum_address[l*A +: A]*8 + i] + sum_word[l*256 + 32*i +: 32];
endmodule
