"""How good an encoder is: k-NN and ridge regression, an attentive probe, and a short fine-tuning of a copy."""
