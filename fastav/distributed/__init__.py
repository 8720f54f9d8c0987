"""Training on several processes: strategies, their launcher, and what the ranks tell one another."""
