-- The shop: invented people, invented numbers. Loaded again before each run of the report.
DROP TABLE IF EXISTS orders, customers, report_archive;
CREATE TABLE customers (
  id integer PRIMARY KEY,
  name text NOT NULL,
  email text NOT NULL,
  ssn text NOT NULL,
  city text NOT NULL
);
CREATE TABLE orders (
  id integer PRIMARY KEY,
  customer integer NOT NULL REFERENCES customers ON DELETE CASCADE,
  cents bigint NOT NULL,
  placed_on date NOT NULL
);
CREATE TABLE report_archive (day date PRIMARY KEY, report text NOT NULL);
INSERT INTO customers VALUES
  (1, 'Ada Byron', 'ada@example.org', '078-05-1120', 'London'),
  (2, 'Grace Murray', 'grace@example.org', '219-09-9999', 'New York'),
  (3, 'Edsger Wybe', 'edsger@example.org', '457-55-5462', 'Rotterdam'),
  (4, 'Barbara Huber', 'barbara@example.org', '323-12-8741', 'Los Angeles'),
  (5, 'Alan Mathison', 'alan@example.org', '561-34-0098', 'Wilmslow');
INSERT INTO orders SELECT n, 1 + n % 5, 500 + (n * 7919) % 20000, date '2025-01-01' + n FROM generate_series(1, 240) n;
INSERT INTO report_archive SELECT date '2024-12-01' + n, 'report of day ' || n FROM generate_series(0, 30) n;
GRANT CONNECT ON DATABASE shop TO reports;
-- As in many a shop, the reporting user may do far more than report.
ALTER TABLE customers OWNER TO reports;
ALTER TABLE orders OWNER TO reports;
ALTER TABLE report_archive OWNER TO reports;
