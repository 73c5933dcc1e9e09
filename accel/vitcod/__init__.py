"""The ViTCoD-style machine: a head's mask as work (`pattern`), shared out to the MAC lines
(`assign`), how an attention call is cut up (`mapping`, ranked by `estimate`) and written down
(`program`), the compiled core (`registers`, `mac_lines`, `dma_flat`, `dma_ddr4`, `engine`), one
call (`run`), a whole network (`simulate`), and the same with numbers (`executor`,
`functional`). `rtl/` holds the MAC lines in Verilog."""
