"""Why routing works: whether tasks pull alike on what they share, and what the routing tables say."""
