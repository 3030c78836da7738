"""Models: shapes, layers, attention, the decoder, the vision tower, and the policy that joins them."""
