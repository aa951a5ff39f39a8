"""What ``experiments.bench`` measures: which cases, whether they are right, and their time, memory or compiled schedule."""
