// Runs the stages of a program one after the other, each from a folder of hex files, and prints
// what happened: "stage number first_cycle", "score row vector value" as scores are written,
// "output address value" at the end of an SpMM, and "cycles" and counts of the stage.
//
// Tokens of Q, K and V come in at `q_port`, `k_port` and `v_port` bytes a cycle since cycle 0,
// behind those that are there from the beginning; those of a stage begin with number
// `operand_base` (`vector_base`). A stage begins in the cycle in which the one before it has
// ended, and the line served first moves on with the cycle. With `sort` the softmax unit, which
// is not modelled, leaves each list of a row in ascending order of its keys. With `resident` the
// decoder makes Q and K, from latents that come in at `latent_port`.
`timescale 1ns / 1ns
module testbench;
    parameter LINES = 4;
    parameter WORDS = 2;
    parameter OPERAND_BANKS = 4;
    parameter KEY_BANKS = 4;
    parameter OUTPUT_BANKS = 4;
    parameter INDEX_PORTS = 2;
    parameter PIECES = 1024;
    parameter ENTRIES = 4096;
    parameter TOKENS = 256;
    parameter LATENTS = 1;
    localparam FIELDS = 9;

    reg [8*200-1:0] folder;
    reg     clk, decode, reset, spmm, lists, sort, unit, resident;
    integer latent_port, latent_kept, latent_all, latent_bytes, cost, rate, q_room, k_room, macs;
    integer cycle, begins, total, capacity, operand_base, vector_base, token_bytes, outputs, rows;
    integer q_port, k_port, v_port, q_kept, k_kept, v_kept, q_all, k_all, v_all;
    integer stage, stages, l, i, j, operand_reads, operand_words, key_reads, key_words;
    integer index_reads, drained;
    reg [31:0] fields [0:FIELDS*1024-1];
    reg [31:0] list_first [0:TOKENS];  // of the unit's rows, and the end
    reg [15:0] least;
    wire    done;
    wire [31:0] turn_line = cycle % LINES;
    wire [31:0] q_tokens = q_kept + (cycle + 1) * q_port / token_bytes;
    wire [31:0] k_tokens = k_kept + (cycle + 1) * k_port / token_bytes;
    wire [31:0] v_tokens = v_kept + (cycle + 1) * v_port / token_bytes;
    wire [31:0] latents = latent_kept + (cycle + 1) * latent_port / latent_bytes;
    wire [31:0] q_there = q_tokens < q_all ? q_tokens : q_all;
    wire [31:0] k_there = k_tokens < k_all ? k_tokens : k_all;
    wire [31:0] v_there = v_tokens < v_all ? v_tokens : v_all;

    array #(.LINES(LINES), .WORDS(WORDS), .OPERAND_BANKS(OPERAND_BANKS), .KEY_BANKS(KEY_BANKS),
            .OUTPUT_BANKS(OUTPUT_BANKS), .INDEX_PORTS(INDEX_PORTS), .PIECES(PIECES),
            .ENTRIES(ENTRIES), .TOKENS(TOKENS)) dut (
        .clk(clk), .reset(reset), .spmm(spmm), .lists(lists), .unit(unit), .cycle(cycle),
        .turn_line(turn_line[15:0]),
        .index_total(total[23:0]), .index_capacity(capacity[23:0]),
        .operand_base(operand_base[15:0]), .vector_base(vector_base[15:0]),
        .operands_there(spmm ? v_there[15:0] : resident ? dec.there[0][15:0] : q_there[15:0]),
        .vectors_there(resident ? dec.there[1][15:0] : k_there[15:0]),
        .done(done)
    );

    decoder #(.WORDS(WORDS), .LATENTS(LATENTS), .TOKENS(TOKENS)) dec (
        .clk(decode), .stage(stage), .latents_there(latents < latent_all ? latents : latent_all),
        .cost(cost), .rate(rate), .q_room(q_room), .k_room(k_room)
    );

    function integer ones(input [LINES-1:0] bits);
        begin
            ones = 0;
            for (l = 0; l < LINES; l = l + 1) ones = ones + bits[l];
        end
    endfunction

    task load;  // everything of the stage, under reset
        begin
            spmm = fields[FIELDS*stage][0];
            unit = fields[FIELDS*stage + 1][0];
            operand_base = fields[FIELDS*stage + 2];
            vector_base = fields[FIELDS*stage + 3];
            total = fields[FIELDS*stage + 4];
            capacity = fields[FIELDS*stage + 5];
            outputs = fields[FIELDS*stage + 6];
            rows = fields[FIELDS*stage + 7];
            if (fields[FIELDS*stage + 8][0]) begin  // opens its unit
                $readmemh($sformatf("%0s/%0d/list_first.hex", folder, stage), list_first);
                for (i = 0; i < rows; i = i + 1) dut.list_end[unit*TOKENS + i] = list_first[i];
            end
            $readmemh($sformatf("%0s/%0d/piece_vector.hex", folder, stage), dut.piece_vector);
            $readmemh($sformatf("%0s/%0d/piece_first.hex", folder, stage), dut.piece_first);
            $readmemh($sformatf("%0s/%0d/piece_length.hex", folder, stage), dut.piece_length);
            $readmemh($sformatf("%0s/%0d/piece_round.hex", folder, stage), dut.piece_round);
            $readmemh($sformatf("%0s/%0d/piece_dense.hex", folder, stage), dut.piece_dense);
            $readmemh($sformatf("%0s/%0d/piece_place.hex", folder, stage), dut.piece_place);
            $readmemh($sformatf("%0s/%0d/line_piece.hex", folder, stage), dut.line_piece);
            $readmemh($sformatf("%0s/%0d/line_entry.hex", folder, stage), dut.line_entry);
            $readmemh($sformatf("%0s/%0d/entry_place.hex", folder, stage), dut.entry_place);
            $readmemh($sformatf("%0s/%0d/row_ready.hex", folder, stage), dut.row_ready);
            $readmemh($sformatf("%0s/%0d/stream.hex", folder, stage), dut.idxbuf.stream);
            $readmemh($sformatf("%0s/%0d/whole.hex", folder, stage), dut.idxbuf.whole);
            $readmemh($sformatf("%0s/%0d/frees.hex", folder, stage), dut.idxbuf.frees);
            if (spmm) $readmemh($sformatf("%0s/v.hex", folder), dut.operand_mem);
            if (!spmm && !resident) $readmemh($sformatf("%0s/q.hex", folder), dut.operand_mem);
            if (!resident) $readmemh($sformatf("%0s/k.hex", folder), dut.key_mem);
            if (spmm) $readmemh($sformatf("%0s/%0d/weight.hex", folder, stage), dut.weight_mem);
            for (i = 0; i < outputs; i = i + 1) dut.output_mem[i] = 0;
            {operand_reads, operand_words, key_reads, key_words, index_reads, drained} = 0;
        end
    endtask

    task load_decoder;
        begin
            $readmemh($sformatf("%0s/chunks.hex", folder), dec.chunks);
            $readmemh($sformatf("%0s/chunk_tokens.hex", folder), dec.chunk_tokens);
            $readmemh($sformatf("%0s/chunk_room.hex", folder), dec.chunk_room);
            $readmemh($sformatf("%0s/chunk_need.hex", folder), dec.chunk_need);
            $readmemh($sformatf("%0s/chunk_release.hex", folder), dec.chunk_release);
            $readmemh($sformatf("%0s/chunk_head.hex", folder), dec.chunk_head);
            $readmemh($sformatf("%0s/latent_of.hex", folder), dec.latent_of);
            $readmemh($sformatf("%0s/latent.hex", folder), dec.latent_mem);
            $readmemh($sformatf("%0s/decoder_weight.hex", folder), dec.weight);
            $readmemh($sformatf("%0s/decoder_bias.hex", folder), dec.bias);
            $readmemh($sformatf("%0s/decoder_multiplier.hex", folder), dec.multiplier);
            $readmemh($sformatf("%0s/decoder_shift.hex", folder), dec.shift);
        end
    endtask

    task step_decoder;  // the first half of a cycle
        begin
            decode = 1;
            #1 decode = 0;
            if (!spmm)
                for (i = 0; i < dec.there[0]*WORDS; i = i + 1) dut.operand_mem[i] = dec.decoded[i];
            for (i = 0; i < dec.there[1]*WORDS; i = i + 1)
                dut.key_mem[i] = dec.decoded[TOKENS*WORDS + i];
            #1;
        end
    endtask

    task sort_lists;  // of the unit: what SDDMM of this stage has written
        integer row, from, to;
        for (row = 0; row < rows; row = row + 1) begin
            from = unit*ENTRIES + sorted_from[row];
            to = unit*ENTRIES + dut.list_end[unit*TOKENS + row];
            for (i = from + 1; i < to; i = i + 1)
                for (j = i; j > from && dut.list_mem[j-1] > dut.list_mem[j]; j = j - 1) begin
                    least = dut.list_mem[j];
                    dut.list_mem[j] = dut.list_mem[j-1];
                    dut.list_mem[j-1] = least;
                end
        end
    endtask
    reg [31:0] sorted_from [0:TOKENS-1];  // where this stage's keys of each row begin

    initial begin
        if (!$value$plusargs("folder=%s", folder)) $finish;
        if (!$value$plusargs("stages=%d", stages)) $finish;
        if (!$value$plusargs("lists=%d", lists)) $finish;
        if (!$value$plusargs("sort=%d", sort)) $finish;
        if (!$value$plusargs("q_port=%d", q_port)) $finish;
        if (!$value$plusargs("k_port=%d", k_port)) $finish;
        if (!$value$plusargs("v_port=%d", v_port)) $finish;
        if (!$value$plusargs("q_kept=%d", q_kept)) $finish;
        if (!$value$plusargs("k_kept=%d", k_kept)) $finish;
        if (!$value$plusargs("v_kept=%d", v_kept)) $finish;
        if (!$value$plusargs("q_all=%d", q_all)) $finish;
        if (!$value$plusargs("k_all=%d", k_all)) $finish;
        if (!$value$plusargs("v_all=%d", v_all)) $finish;
        if (!$value$plusargs("token_bytes=%d", token_bytes)) $finish;
        if (!$value$plusargs("resident=%d", resident)) resident = 0;
        latent_bytes = 1;
        decode = 0;
        if (resident) begin
            if (!$value$plusargs("latent_port=%d", latent_port)) $finish;
            if (!$value$plusargs("latent_kept=%d", latent_kept)) $finish;
            if (!$value$plusargs("latent_all=%d", latent_all)) $finish;
            if (!$value$plusargs("latent_bytes=%d", latent_bytes)) $finish;
            if (!$value$plusargs("cost=%d", cost)) $finish;
            if (!$value$plusargs("rate=%d", rate)) $finish;
            if (!$value$plusargs("q_room=%d", q_room)) $finish;
            if (!$value$plusargs("k_room=%d", k_room)) $finish;
            load_decoder;
        end
        $readmemh($sformatf("%0s/stages.hex", folder), fields);
        cycle = 0;
        for (stage = 0; stage < stages; stage = stage + 1) begin
            clk = 0;
            reset = 1;
            load;
            for (i = 0; i < rows; i = i + 1) sorted_from[i] = dut.list_end[unit*TOKENS + i];
            begins = cycle;
            $display("stage %0d %0d", stage, begins);
            #1 clk = 1;
            #1 clk = 0;
            reset = 0;
            #1;
            while (!done) begin
                if (resident) step_decoder;
                operand_reads = operand_reads + dut.operand_reads;
                operand_words = operand_words + ones(dut.operand_grant);
                key_reads = key_reads + dut.key_reads;
                key_words = key_words + ones(dut.key_grant);
                index_reads = index_reads + ones(dut.index_grant);
                drained = drained + dut.drains;
                for (i = 0; i < LINES; i = i + 1)
                    if (dut.score_valid[i])
                        $display("score %0d %0d %0d", dut.score_row[i*16 +: 16],
                                 dut.score_vector[i*16 +: 16], $signed(dut.score[i*32 +: 32]));
                if (cycle > begins + 1000000) begin
                    $display("endless");
                    $finish;
                end
                #1 clk = 1;
                #1 clk = 0;
                cycle = cycle + 1;
                #1;
            end
            if (lists && sort && !spmm) sort_lists;
            for (i = 0; i < outputs; i = i + 1)
                $display("output %0d %0d", i, dut.output_mem[i]);
            $display("cycles %0d", cycle - begins);
            $display("operand_reads %0d", operand_reads);
            $display("operand_words %0d", operand_words);
            $display("key_reads %0d", key_reads);
            $display("key_words %0d", key_words);
            $display("index_reads %0d", index_reads);
            $display("drained %0d", drained);
            if (resident) $display("decoder_macs %0d", dec.macs);
        end
        $finish;
    end
endmodule
