"""What is no layer: ``quantize_fp8`` by itself, and the rates of plain XLA that floors rest on."""
