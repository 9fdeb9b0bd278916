"""LocalLeap: masked diffusion language models whose tokens are committed by the anchor_decoding ops."""
