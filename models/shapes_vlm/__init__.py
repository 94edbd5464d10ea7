"""shapes-vlm: a small LLaVA trained from scratch on drawn scenes, so that answers can be right or wrong."""
