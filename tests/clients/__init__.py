"""Trainers of other libraries, each in a small real run with freezing."""
