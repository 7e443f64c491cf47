"""Training: what a SNAC is judged by (`losses`), and the networks that judge it too (`discriminators`)."""
