// The decoder of Q and K where the latents of a codec block stay on chip: token after token, each
// head when its chunk has room, the chunk that the earlier stage needs first, equals in turn.
// A token takes `cost` MACs of `rate` a cycle and can begin once its latents are there.
//
// It works in the first half of a cycle and writes into the buffers what the lines may read in
// the second. Tables of the chunks, latents and weights are loaded before; of each table the
// first half is Q's, the second K's.
module decoder #(
    parameter WORDS = 2,
    parameter LATENTS = 2,  // latent heads of a codec block
    parameter CHUNKS = 256,
    parameter HEADS = 16,
    parameter TOKENS = 256
) (
    input             clk,
    input      [31:0] stage,
    input      [31:0] latents_there,
    input      [31:0] cost,
    input      [31:0] rate,
    input      [31:0] q_room,         // bytes of the regions
    input      [31:0] k_room
);
    reg [31:0] chunks        [0:1];
    reg [31:0] chunk_tokens  [0:2*CHUNKS-1];
    reg [31:0] chunk_room    [0:2*CHUNKS-1];
    reg [31:0] chunk_need    [0:2*CHUNKS-1];
    reg [31:0] chunk_release [0:2*CHUNKS-1];
    reg [31:0] chunk_head    [0:2*CHUNKS-1];
    reg [31:0] latent_of     [0:2*TOKENS-1];
    reg [63:0] latent_mem    [0:2*TOKENS*LATENTS*WORDS-1];
    reg signed [31:0] weight     [0:2*HEADS*LATENTS-1];
    reg signed [31:0] bias       [0:2*HEADS-1];
    reg signed [31:0] multiplier [0:2*HEADS-1];
    reg [31:0]        shift      [0:2*HEADS-1];
    reg [63:0] decoded [0:2*TOKENS*WORDS-1];

    reg [31:0] there [0:1];  // tokens that are decoded
    reg [31:0] chunk [0:1];
    reg [31:0] begun [0:1];  // tokens of the chunk
    reg [31:0] freed [0:1];
    reg [31:0] used  [0:1];
    reg [31:0] left, credit, given, macs, first, head;
    reg        side, can_q, can_k, going;
    reg signed [63:0] sum, whole, rest, half;
    integer s, w, i, l;

    initial begin
        for (s = 0; s < 2; s = s + 1) {there[s], chunk[s], begun[s], freed[s], used[s]} = 0;
        left = 0;
        macs = 0;
        side = 1;
    end

    function can(input which);
        can = chunk[which] < chunks[which]
              && (begun[which] != 0 || used[which] + chunk_room[which*CHUNKS + chunk[which]]
                                       <= (which ? k_room : q_room))
              && latent_of[which*TOKENS + there[which]] < latents_there;
    endfunction

    function [7:0] rescaled(input signed [63:0] product, input [31:0] places);
        begin  // half to even, then saturated
            whole = product >>> places;
            rest = product - (whole <<< places);
            half = places == 0 ? 0 : 64'sd1 <<< (places - 1);
            if (places != 0 && (rest > half || rest == half && whole[0])) whole = whole + 1;
            rescaled = whole > 127 ? 127 : whole < -127 ? -127 : whole[7:0];
        end
    endfunction

    task finish;  // the token in work
        begin
            first = latent_of[side*TOKENS + there[side]] * LATENTS;
            head = side*HEADS + chunk_head[side*CHUNKS + chunk[side]];
            for (w = 0; w < WORDS; w = w + 1)
                for (i = 0; i < 8; i = i + 1) begin
                    sum = bias[head];
                    for (l = 0; l < LATENTS; l = l + 1)
                        sum = sum + weight[head*LATENTS + l]
                                    * $signed(latent_mem[(first + l)*WORDS + w][8*i +: 8]);
                    decoded[(side*TOKENS + there[side])*WORDS + w][8*i +: 8]
                        = rescaled(sum * multiplier[head], shift[head]);
                end
            there[side] = there[side] + 1;
            begun[side] = begun[side] + 1;
            if (begun[side] == chunk_tokens[side*CHUNKS + chunk[side]]) begin
                begun[side] = 0;
                chunk[side] = chunk[side] + 1;
            end
        end
    endtask

    always @(posedge clk) begin
        for (s = 0; s < 2; s = s + 1)
            while (freed[s] < chunk[s] && chunk_release[s*CHUNKS + freed[s]] <= stage) begin
                used[s] = used[s] - chunk_room[s*CHUNKS + freed[s]];
                freed[s] = freed[s] + 1;
            end
        credit = rate;
        going = 1;
        while (going && credit > 0) begin
            if (left == 0) begin
                can_q = can(0);
                can_k = can(1);
                going = can_q || can_k;
                if (can_q && can_k)
                    side = chunk_need[chunk[0]] == chunk_need[CHUNKS + chunk[1]]
                           ? !side : chunk_need[CHUNKS + chunk[1]] < chunk_need[chunk[0]];
                else if (going) side = can_k;
                if (going) begin
                    left = cost;
                    if (begun[side] == 0)
                        used[side] = used[side] + chunk_room[side*CHUNKS + chunk[side]];
                end
            end
            if (going) begin
                given = credit < left ? credit : left;
                credit = credit - given;
                left = left - given;
                macs = macs + given;
                if (left == 0) finish;
            end
        end
    end
endmodule
