"""int8 and int4 weights. Imported where a checkpoint is quantized, or is to be."""
