import java.nio.file.Files;
import java.nio.file.Path;
import org.apache.flink.configuration.Configuration;
import org.apache.flink.table.api.EnvironmentSettings;
import org.apache.flink.table.api.TableEnvironment;
import org.apache.flink.table.api.TableResult;

/** Runs SQL statements, separated by ';' at line ends, in this JVM: Flink's local mini-cluster. Arguments: SQL file, settings file. */
public class Job {
  public static void main(String[] files) throws Exception {
    Configuration settings = new Configuration();
    for (String line : Files.readAllLines(Path.of(files[1]))) {
      int at = line.indexOf('=');
      settings.setString(line.substring(0, at), line.substring(at + 1));
    }
    TableEnvironment tables =
        TableEnvironment.create(EnvironmentSettings.newInstance().inStreamingMode().withConfiguration(settings).build());
    TableResult last = null;
    for (String statement : Files.readString(Path.of(files[0])).split(";\\s*\\n")) {
      if (!statement.isBlank()) last = tables.executeSql(statement);
    }
    last.await();
  }
}
