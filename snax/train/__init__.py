"""Training: what a SNAC is judged by (`losses`), the networks that judge it too (`discriminators`), and what is moved
(`weight_norm`)."""
