"""DEIMv2's network: backbones, encoders and decoder."""
