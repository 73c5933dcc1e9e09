// One MAC line: control, index registers, key registers, 8 multipliers, accumulators.
//
// SDDMM (spmm = 0): the line holds a key, reads the next into its second register, and takes
// one word (8 int8) of a query a cycle; the adder tree sums words to a score.
// SpMM (spmm = 1): it holds an output row in one of two sets of accumulators and takes one
// word of a value row a cycle, times the row's weight; the finished set drains word by word.
//
// A word that is granted in cycle t is read from its SRAM, multiplied in t + 1, summed in
// t + 2, accumulated in t + 3 and its result written in t + 4.
module mac_line #(
    parameter WORDS = 2,
    parameter ADDRESS = 24
) (
    input                   clk,
    input                   reset,
    input                   spmm,
    // The line's own part of the schedule, and the piece it points at.
    input  [15:0]           first_piece,
    input  [15:0]           last_piece,
    input  [ADDRESS-1:0]    first_entry,
    input  [ADDRESS-1:0]    last_entry,
    output reg [15:0]       piece,
    output [15:0]           next_piece,   // at the end of this cycle
    output [15:0]           preloading,   // the piece whose key is read
    input                   dense,
    input  [15:0]           vector,
    input  [15:0]           first_operand,
    input  [15:0]           length,
    input                   held,         // by the lockstep barrier, or the softmax unit
    // Lists of rows, where one index stream serves both products
    input                   listed,       // operands of the sparser engine come from there
    input  [15:0]           list_entry,   // what stands at the piece's `used`th place
    output reg [15:0]       used,         // operands of the piece
    output                  listing,      // a score of the sparser engine is made: of `operand`
    // IdxBuf
    output                  index_wanted,
    output reg [ADDRESS-1:0] fetched,
    input                   index_grant,
    input  [15:0]           index_entry,
    // Operands: queries or value rows; token 0 of this product is number `operand_base`
    input  [15:0]           operand_base,
    input  [15:0]           operands_there,
    output                  operand_wanted,
    output [ADDRESS-1:0]    operand_address,
    input                   operand_grant,
    input  [63:0]           operand_word, // one cycle after its grant
    output [15:0]           operand,      // of the weight that SpMM needs
    input  [7:0]            weight,
    // Keys
    input  [15:0]           preload_vector, // counted like operands_there
    input  [15:0]           vectors_there,
    output                  key_wanted,
    output [ADDRESS-1:0]    key_address,
    input                   key_grant,
    input  [63:0]           key_word,     // one cycle after its grant
    // Results
    output                  drain_wanted,
    output [ADDRESS-1:0]    drain_address,
    input                   drain_grant,
    output reg              score_valid,
    output reg [15:0]       score_row,
    output reg [15:0]       score_vector,
    output reg signed [31:0] score,
    output reg              sum_valid,
    output reg [ADDRESS-1:0] sum_address,
    output reg [255:0]      sum_word,     // 8 int32
    output                  working,      // has pieces or a row to drain
    output                  in_flight     // something is in the pipeline
);
    integer i;

    // ---- control ----
    reg [15:0]        word;
    reg [ADDRESS-1:0] consumed;
    reg [15:0]        entry0, entry1;  // index registers
    reg               holds, selected, preload_into;
    reg [15:0]        preload;
    reg [15:0]        draining, drain_row;
    reg               set, drain_set;

    wire has_piece = piece != last_piece;
    wire known = dense || listed || fetched != consumed;
    wire last_word = word == WORDS - 1;
    wire last_operand = used == length - 1;
    assign operand = dense ? first_operand + used : listed ? list_entry : entry0;
    wire [15:0] token = operand_base + operand;
    wire arrived = token < operands_there;

    assign index_wanted = !listed && fetched != last_entry && fetched - consumed < 2;
    wire kept_back = spmm ? draining != 0 && last_operand && last_word : !holds;
    assign operand_wanted = has_piece && !held && known && arrived && !kept_back;
    assign operand_address = token * WORDS + word;

    wire word_done = operand_grant;
    wire operand_done = word_done && last_word;
    wire piece_done = operand_done && last_operand;
    assign listing = operand_done && !dense && !spmm;
    assign next_piece = piece + piece_done;
    assign preloading = piece + holds;
    assign key_wanted = !spmm && preload < WORDS && preloading != last_piece && has_piece
                        && preload_vector < vectors_there;
    assign key_address = preload_vector * WORDS + preload;
    wire [15:0] preloaded = preload + key_grant;
    wire        still_holds = holds && !piece_done;
    wire        take_key = !spmm && preloaded == WORDS && !still_holds;

    assign drain_wanted = draining != 0;
    assign drain_address = drain_row * WORDS + WORDS - draining;
    assign working = has_piece || draining != 0;

    always @(posedge clk) begin
        if (reset) begin
            piece <= first_piece;
            {used, word, preload, draining} <= 0;
            {fetched, consumed} <= {first_entry, first_entry};
            {holds, selected, preload_into, set} <= 0;
        end else begin
            piece <= next_piece;
            if (word_done) word <= last_word ? 0 : word + 1;
            if (operand_done) used <= last_operand ? 0 : used + 1;
            // Index registers: a read fills the first free one, an operand done frees one.
            fetched <= fetched + index_grant;
            if (operand_done && !dense) begin
                consumed <= consumed + 1;
                entry0 <= fetched - consumed == 2 ? entry1 : index_entry;
                entry1 <= index_entry;
            end else if (index_grant) begin
                if (fetched == consumed) entry0 <= index_entry;
                else entry1 <= index_entry;
            end
            // Key registers
            holds <= still_holds || take_key;
            preload <= take_key ? 0 : preloaded;
            if (take_key) begin
                selected <= preload_into;
                preload_into <= !preload_into;
            end
            // Drain
            if (drain_grant) draining <= draining - 1;
            if (spmm && piece_done) begin
                draining <= WORDS;
                drain_row <= vector;
                drain_set <= set;
                set <= !set;
            end
        end
    end

    // ---- data ----
    reg [63:0]        key [0:2*WORDS-1];
    reg               key_valid, key_into;
    reg [15:0]        key_at;
    reg               valid1, valid2, valid3, begins1, begins2, begins3, ends1, ends2, ends3;
    reg               fresh1, fresh2, fresh3, key1, set1, set2, set3;
    reg [15:0]        word1, word2, word3, row1, row2, row3, vector1, vector2, vector3;
    reg [7:0]         weight1;
    reg signed [17:0] product [0:7];
    reg signed [31:0] tree, partial, total;
    reg [255:0]       terms;
    reg [255:0]       accumulators [0:2*WORDS-1];
    reg               drain1, drain2, drain3, drain_set1, drain_set2, drain_set3;
    reg [ADDRESS-1:0] drain_at1, drain_at2, drain_at3;
    reg signed [7:0]  left, right;
    reg [63:0]        held_word;
    reg [255:0]       sums;

    assign in_flight = valid1 || valid2 || valid3 || drain1 || drain2 || drain3 || score_valid
                       || sum_valid;

    always @(posedge clk) begin
        if (reset) begin
            {key_valid, valid1, valid2, valid3, drain1, drain2, drain3} <= 0;
            {score_valid, sum_valid} <= 0;
        end else begin
            // t: SRAM reads
            key_valid <= key_grant;
            key_into <= preload_into;
            key_at <= preload;
            valid1 <= word_done;
            begins1 <= word == 0;
            ends1 <= last_word;
            fresh1 <= used == 0;
            key1 <= selected;
            set1 <= set;
            word1 <= word;
            row1 <= operand;
            vector1 <= vector;
            weight1 <= weight;
            drain1 <= drain_grant;
            drain_at1 <= drain_address;
            drain_set1 <= drain_set;
            // t + 1: key registers, multipliers
            if (key_valid) key[key_into*WORDS + key_at] <= key_word;
            held_word = key[key1*WORDS + word1];
            for (i = 0; i < 8; i = i + 1) begin
                left = operand_word[8*i +: 8];
                right = held_word[8*i +: 8];
                product[i] <= spmm ? left * $signed({1'b0, weight1}) : left * right;
            end
            {valid2, begins2, ends2, fresh2, set2} <= {valid1, begins1, ends1, fresh1, set1};
            {word2, row2, vector2} <= {word1, row1, vector1};
            {drain2, drain_at2, drain_set2} <= {drain1, drain_at1, drain_set1};
            // t + 2: adder tree (SDDMM); SpMM keeps its 8 terms
            tree <= product[0] + product[1] + product[2] + product[3]
                    + product[4] + product[5] + product[6] + product[7];
            for (i = 0; i < 8; i = i + 1) terms[32*i +: 32] <= product[i];
            {valid3, begins3, ends3, fresh3, set3} <= {valid2, begins2, ends2, fresh2, set2};
            {word3, row3, vector3} <= {word2, row2, vector2};
            {drain3, drain_at3, drain_set3} <= {drain2, drain_at2, drain_set2};
            // t + 3: accumulators
            total = (begins3 ? 0 : partial) + tree;
            if (valid3) partial <= total;
            score_valid <= valid3 && ends3 && !spmm;
            {score_row, score_vector, score} <= {row3, vector3, total};
            sum_valid <= drain3;
            sum_address <= drain_at3;
            sum_word <= accumulators[drain_set3*WORDS + drain_at3 % WORDS];
            if (valid3 && spmm) begin
                sums = fresh3 ? 0 : accumulators[set3*WORDS + word3];
                for (i = 0; i < 8; i = i + 1)
                    sums[32*i +: 32] = sums[32*i +: 32] + terms[32*i +: 32];
                accumulators[set3*WORDS + word3] <= sums;
            end
        end
    end
endmodule
