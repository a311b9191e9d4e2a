"""streamproc: Faust's agents, Flink's guarantees, columnar speed."""
