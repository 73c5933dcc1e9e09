// Runs one product from a folder of hex files and prints what happened: "score row vector
// value" as scores are written, "output address value" at the end, and the counts.
//
// Tokens of Q (V) and K come in at `operand_port` and `key_port` bytes a cycle since cycle 0,
// those of this product from number `operand_base` (`vector_base`) on. The product begins in
// cycle `begin`, and the line served first moves on with the cycle.
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

    reg [8*200-1:0] folder;
    reg     clk, reset, spmm;
    integer cycle, begins, operands, vectors, total, capacity, operand_port, key_port;
    integer operand_base, vector_base, token_bytes, outputs, l, i, operand_reads, operand_words, key_reads, key_words;
    integer index_reads, drained;
    wire    done;
    wire [31:0] turn_line = cycle % LINES;
    wire [31:0] operand_tokens = (cycle + 1) * operand_port / token_bytes;
    wire [31:0] key_tokens = (cycle + 1) * key_port / token_bytes;

    array #(.LINES(LINES), .WORDS(WORDS), .OPERAND_BANKS(OPERAND_BANKS), .KEY_BANKS(KEY_BANKS),
            .OUTPUT_BANKS(OUTPUT_BANKS), .INDEX_PORTS(INDEX_PORTS), .PIECES(PIECES),
            .ENTRIES(ENTRIES), .TOKENS(TOKENS)) dut (
        .clk(clk), .reset(reset), .spmm(spmm), .turn_line(turn_line[15:0]),
        .index_total(total[23:0]), .index_capacity(capacity[23:0]),
        .operand_base(operand_base[15:0]), .vector_base(vector_base[15:0]),
        .operands_there(operand_tokens < operands ? operand_tokens[15:0] : operands[15:0]),
        .vectors_there(key_tokens < vectors ? key_tokens[15:0] : vectors[15:0]),
        .done(done)
    );

    function integer ones(input [LINES-1:0] bits);
        begin
            ones = 0;
            for (l = 0; l < LINES; l = l + 1) ones = ones + bits[l];
        end
    endfunction

    initial begin
        if (!$value$plusargs("folder=%s", folder)) $finish;
        if (!$value$plusargs("spmm=%d", spmm)) $finish;
        if (!$value$plusargs("begin=%d", begins)) $finish;
        if (!$value$plusargs("operands=%d", operands)) $finish;
        if (!$value$plusargs("vectors=%d", vectors)) $finish;
        if (!$value$plusargs("operand_base=%d", operand_base)) $finish;
        if (!$value$plusargs("vector_base=%d", vector_base)) $finish;
        if (!$value$plusargs("entries=%d", total)) $finish;
        if (!$value$plusargs("capacity=%d", capacity)) $finish;
        if (!$value$plusargs("operand_port=%d", operand_port)) $finish;
        if (!$value$plusargs("key_port=%d", key_port)) $finish;
        if (!$value$plusargs("token_bytes=%d", token_bytes)) $finish;
        if (!$value$plusargs("outputs=%d", outputs)) $finish;
        $readmemh({folder, "/piece_vector.hex"}, dut.piece_vector);
        $readmemh({folder, "/piece_first.hex"}, dut.piece_first);
        $readmemh({folder, "/piece_length.hex"}, dut.piece_length);
        $readmemh({folder, "/piece_round.hex"}, dut.piece_round);
        $readmemh({folder, "/piece_dense.hex"}, dut.piece_dense);
        $readmemh({folder, "/line_piece.hex"}, dut.line_piece);
        $readmemh({folder, "/line_entry.hex"}, dut.line_entry);
        $readmemh({folder, "/entry_place.hex"}, dut.entry_place);
        $readmemh({folder, "/stream.hex"}, dut.idxbuf.stream);
        $readmemh({folder, "/operand.hex"}, dut.operand_mem);
        $readmemh({folder, "/key.hex"}, dut.key_mem);
        $readmemh({folder, "/weight.hex"}, dut.weight_mem);
        for (i = 0; i < outputs; i = i + 1) dut.output_mem[i] = 0;
        {operand_reads, operand_words, key_reads, key_words, index_reads, drained} = 0;
        cycle = begins - 1;
        clk = 0;
        reset = 1;
        #1 clk = 1;
        #1 clk = 0;
        reset = 0;
        cycle = begins;
        #1;
        while (!done) begin
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
        for (i = 0; i < outputs; i = i + 1)
            $display("output %0d %0d", i, dut.output_mem[i]);
        $display("cycles %0d", cycle - begins);
        $display("operand_reads %0d", operand_reads);
        $display("operand_words %0d", operand_words);
        $display("key_reads %0d", key_reads);
        $display("key_words %0d", key_words);
        $display("index_reads %0d", index_reads);
        $display("drained %0d", drained);
        $finish;
    end
endmodule
