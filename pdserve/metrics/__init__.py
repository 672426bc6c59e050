"""The catalogue of metrics: one table for each kind of process that shows some, and what is made of them."""
