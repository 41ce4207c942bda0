"""Floor 2: model spec, checkpoints, ONNX blocks, packs, block runner. Heavy imports are lazy."""
