"""The compiled core: registers, MAC lines, DMA channels, decoder and the loop that steps them."""
