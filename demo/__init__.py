"""The main job's input, an outside computation of its results, and what writes the one and checks the other."""
