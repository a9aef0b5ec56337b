"""Quantize a bundle: activation statistics, scales fitted to them, quantized graphs.

Needs the extra `calibration`; rendering a quantized bundle does not.
"""
