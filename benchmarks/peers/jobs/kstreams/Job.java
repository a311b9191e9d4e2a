import java.io.ByteArrayOutputStream;
import java.io.File;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.lang.management.ManagementFactory;
import java.nio.ByteBuffer;
import java.time.Duration;
import java.util.Properties;
import org.apache.avro.Schema;
import org.apache.avro.generic.GenericDatumReader;
import org.apache.avro.generic.GenericDatumWriter;
import org.apache.avro.generic.GenericRecord;
import org.apache.avro.io.BinaryDecoder;
import org.apache.avro.io.BinaryEncoder;
import org.apache.avro.io.DecoderFactory;
import org.apache.avro.io.EncoderFactory;
import org.apache.kafka.common.serialization.Deserializer;
import org.apache.kafka.common.serialization.Serde;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.common.serialization.Serializer;
import org.apache.kafka.common.utils.Bytes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.KeyValue;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.kstream.Consumed;
import org.apache.kafka.streams.kstream.EmitStrategy;
import org.apache.kafka.streams.kstream.Grouped;
import org.apache.kafka.streams.kstream.KStream;
import org.apache.kafka.streams.kstream.Materialized;
import org.apache.kafka.streams.kstream.Produced;
import org.apache.kafka.streams.kstream.TimeWindows;
import org.apache.kafka.streams.processor.api.FixedKeyProcessor;
import org.apache.kafka.streams.processor.api.FixedKeyProcessorContext;
import org.apache.kafka.streams.processor.api.FixedKeyRecord;
import org.apache.kafka.streams.state.KeyValueStore;
import org.apache.kafka.streams.state.Stores;
import org.apache.kafka.streams.state.WindowStore;

/** The jobs on Kafka Streams. Arguments: a file of Kafka Streams' own settings; what else it is told are system properties. */
public class Job {
  static final Schema SCHEMA = parse(System.getProperty("schema"));
  static final int SCHEMA_ID = Integer.getInteger("schema.id");
  static final Duration WINDOW = Duration.ofMillis(Long.getLong("window.ms"));
  static final Duration GRACE = Duration.ofMillis(Long.getLong("grace.ms"));
  static final Duration REMEMBERED = Duration.ofMillis(Long.getLong("remembered.ms"));
  static volatile boolean begun;

  static Schema parse(String file) {
    try {
      return new Schema.Parser().parse(new File(file));
    } catch (IOException e) {
      throw new UncheckedIOException(e);
    }
  }

  /** The harness reads the clock of this process at its first record. */
  static void begin() {
    begun = true;
    var system = (com.sun.management.OperatingSystemMXBean) ManagementFactory.getOperatingSystemMXBean();
    System.out.println("@@first " + system.getProcessCpuTime() / 1e9);
  }

  static class OrderWriter implements Serializer<GenericRecord> {
    final GenericDatumWriter<GenericRecord> writer = new GenericDatumWriter<>(SCHEMA);

    public byte[] serialize(String topic, GenericRecord order) {
      if (order == null) return null;
      try {
        var out = new ByteArrayOutputStream(160);
        out.write(0);
        out.write(ByteBuffer.allocate(4).putInt(SCHEMA_ID).array());
        BinaryEncoder encoder = EncoderFactory.get().directBinaryEncoder(out, null);
        writer.write(order, encoder);
        encoder.flush();
        return out.toByteArray();
      } catch (IOException e) {
        throw new UncheckedIOException(e);
      }
    }
  }

  static class OrderReader implements Deserializer<GenericRecord> {
    final GenericDatumReader<GenericRecord> reader = new GenericDatumReader<>(SCHEMA);
    BinaryDecoder decoder;

    public GenericRecord deserialize(String topic, byte[] value) {
      if (value == null) return null;
      if (!begun) begin();
      try {
        decoder = DecoderFactory.get().binaryDecoder(value, 5, value.length - 5, decoder);
        return reader.read(null, decoder);
      } catch (IOException e) {
        throw new UncheckedIOException(e);
      }
    }
  }

  record Revenue(long count, double sum) {}

  static final Serde<GenericRecord> ORDER = Serdes.serdeFrom(new OrderWriter(), new OrderReader());
  static final Serde<Revenue> REVENUE =
      Serdes.serdeFrom(
          (topic, row) -> ByteBuffer.allocate(16).putLong(row.count).putDouble(row.sum).array(),
          (topic, bytes) -> {
            if (bytes == null) return null;
            var at = ByteBuffer.wrap(bytes);
            return new Revenue(at.getLong(), at.getDouble());
          });

  /** Kafka Streams has no operator for it: a window store holds the ids. */
  static class Dedupe implements FixedKeyProcessor<String, GenericRecord, GenericRecord> {
    FixedKeyProcessorContext<String, GenericRecord> context;
    WindowStore<String, Long> seen;

    public void init(FixedKeyProcessorContext<String, GenericRecord> context) {
      this.context = context;
      seen = context.getStateStore("seen");
    }

    public void process(FixedKeyRecord<String, GenericRecord> order) {
      String id = order.value().get("order_id").toString();
      long at = order.timestamp(), within = REMEMBERED.toMillis();
      try (var found = seen.fetch(id, at - within, at + within)) {
        if (found.hasNext()) return;
      }
      seen.put(id, at, at);
      context.forward(order);
    }
  }

  static boolean completed(GenericRecord order) {
    return "completed".contentEquals((CharSequence) order.get("status"));
  }

  static void pipeline(StreamsBuilder builder, KStream<String, GenericRecord> orders, String output) {
    var seen = Stores.persistentWindowStore("seen", REMEMBERED.plus(GRACE), REMEMBERED, false);
    builder.addStateStore(Stores.windowStoreBuilder(seen, Serdes.String(), Serdes.Long()));
    orders
        .processValues(Dedupe::new, "seen")
        .filter((user, order) -> completed(order))
        .map((user, order) -> KeyValue.pair(order.get("country").toString(), (Double) order.get("amount")))
        .groupByKey(Grouped.with("country", Serdes.String(), Serdes.Double()))
        .windowedBy(TimeWindows.ofSizeAndGrace(WINDOW, GRACE))
        .emitStrategy(EmitStrategy.onWindowClose())
        .aggregate(
            () -> new Revenue(0, 0),
            (country, amount, row) -> new Revenue(row.count + 1, row.sum + amount),
            Materialized.<String, Revenue, WindowStore<Bytes, byte[]>>as("revenue")
                .withKeySerde(Serdes.String())
                .withValueSerde(REVENUE))
        .toStream()
        .map((window, row) -> KeyValue.pair(window.key(), json(window.key(), window.window().start(), row)))
        .to(output, Produced.with(Serdes.String(), Serdes.String()));
  }

  static String json(String country, long start, Revenue row) {
    return "{\"country\":\"" + country + "\",\"window_start\":" + start + ",\"count\":" + row.count + ",\"sum\":" + row.sum + "}";
  }

  public static void main(String[] files) throws Exception {
    Properties settings = new Properties();
    try (var in = new java.io.FileReader(files[0])) {
      settings.load(in);
    }
    String output = System.getProperty("output");
    StreamsBuilder builder = new StreamsBuilder();
    KStream<String, GenericRecord> orders =
        builder.stream(
            System.getProperty("source"),
            Consumed.with(Serdes.String(), ORDER)
                .withTimestampExtractor((order, time) -> (Long) ((GenericRecord) order.value()).get("event_time")));
    switch (System.getProperty("job")) {
      case "pipeline" -> pipeline(builder, orders, output);
      case "count" ->
          orders
              .groupByKey()
              .count(
                  Materialized.<String, Long, KeyValueStore<Bytes, byte[]>>as("counts")
                      .withKeySerde(Serdes.String())
                      .withValueSerde(Serdes.Long()));
      case "forward" -> orders.filter((user, order) -> completed(order)).to(output, Produced.with(Serdes.String(), ORDER));
      default -> throw new IllegalArgumentException(System.getProperty("job"));
    }
    KafkaStreams streams = new KafkaStreams(builder.build(), settings);
    Runtime.getRuntime().addShutdownHook(new Thread(() -> streams.close(Duration.ofSeconds(8))));
    streams.start();
  }
}
