"""Activation-aware weight quantization: scales, clip limits and GPTQ codes for a checkpoint.

One pass over the decoder layers measures what goes into each weight; everything is then searched
on the Gram matrix of those inputs, a layer at a time. The result is an overlay
(`phiconv.checkpoint.overlay`). docs/awq.md explains it.
"""
