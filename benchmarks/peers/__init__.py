"""The jobs of our benchmarks on Faust, Quix Streams, Flink SQL and Kafka Streams."""
