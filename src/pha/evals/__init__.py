"""Measuring trained models: perplexities, and text sampled from them."""
