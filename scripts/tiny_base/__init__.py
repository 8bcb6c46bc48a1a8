"""How the embedded base models are trained from nothing: drawn scenes, an autoencoder, text encoders, a denoiser."""
