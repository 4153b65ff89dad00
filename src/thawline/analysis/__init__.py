"""Analysis of routing: alignment of the tasks' gradients, and statistics of the routing tables."""
