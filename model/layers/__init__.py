"""The parts of a decoder layer: linears, attention, rotary embedding, KV cache."""
