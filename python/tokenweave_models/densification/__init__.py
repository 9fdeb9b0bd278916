"""Network densification: the SINR of a user in a Poisson field of base stations, from sparse to ultra-dense.

Any multi-slope path loss, any fading tail, strongest or nearest cell; exact laws beside every simulation.

Source: Nguyen and Kountouris, "Performance limits of network densification", arXiv 1611.07790.
"""
