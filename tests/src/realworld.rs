//! Programs from Debian's packages, unmodified, with work that needs several times more memory than they get. The same
//! work, smaller, is in the tests.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use crate::rng::Rng;

/// A program and its work. What it prints depends on nothing but that.
#[derive(Debug)]
pub struct Case {
    /// For people.
    pub name: &'static str,
    /// The package that has the program.
    pub package: &'static str,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// RAM budget in MiB for about a third of what it needs.
    pub budget_mib: u64,
}

/// All of them, with their input in `dir`. `scale` 1 is for tests, of some ten MiB each.
///
/// # Panics
/// If the input cannot be written.
#[must_use]
pub fn cases(dir: &Path, scale: u64) -> Vec<Case> {
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<String>>();
    let python =
        |script: &str| words(&["/usr/bin/python3", "-c", &script.replace("SCALE", &scale.to_string())]);
    let (lines, blocks) = (dir.join("lines"), dir.join("blocks"));
    write_lines(&lines, 250_000 * scale);
    write_blocks(&blocks, 24 * scale);
    let (lines, blocks) = (lines.display().to_string(), blocks.display().to_string());
    let buffer = format!("--buffer-size={}M", 64 * scale);
    let sql = SQL.replace("ROWS", &(120_000 * scale).to_string());
    let perl = PERL.replace("KEYS", &(100_000 * scale).to_string());
    let case =
        |name, package, command, budget_mib| Case { name, package, command, budget_mib: budget_mib * scale };
    vec![
        case(
            "GNU sort",
            "coreutils",
            words(&["env", "LC_ALL=C", "sort", "--parallel=2", &buffer, &lines]),
            10,
        ),
        case("python3, dict and lists", "python3", python(DICTS), 9),
        case("python3, numpy", "python3-numpy", python(ARRAYS), 32),
        case("python3, fork", "python3", python(FORK), 16),
        case("sqlite3 :memory:", "sqlite3", words(&["sqlite3", ":memory:", &sql]), 9),
        case("zstd --long -T2", "zstd", words(&["zstd", "-q", "-2", "--long=24", "-T2", "-c", &blocks]), 12),
        case("perl, hash", "perl", words(&["perl", "-e", &perl]), 9),
    ]
}

const DICTS: &str = "
n = 60000 * SCALE
d = {}
for i in range(n):
    d['key%d' % (i * 2654435761 % 4294967296)] = [i, i * 3, str(i * 40503 % 65536)]
total = 0
for i in range(n):
    a, b, c = d['key%d' % (i * 2654435761 % 4294967296)]
    assert b == 3 * a == 3 * i and c == str(i * 40503 % 65536)
    total += b + len(c)
print(n, total, len(d))
";

const ARRAYS: &str = "
import numpy as np
n = 3000000 * SCALE
a = (np.arange(n, dtype=np.uint64) * np.uint64(6364136223846793005)) ^ np.uint64(0x5bd1e995)
b = a[::-1] ^ (a >> np.uint64(7))
c = np.empty(n)
c[:] = b % np.uint64(1000003)
print(int(a.sum()), int(b.sum()), c.sum(), int((a ^ b).max()))
";

const FORK: &str = "
import os, hashlib
n = 48 * SCALE
def block(side, i):
    return hashlib.shake_128(b'%d %d' % (side, i)).digest(1 << 20)
data = [bytearray(block(0, i)) for i in range(n)]
pid = os.fork()
side = 2 if pid else 1
for i in range(0, n, side + 1):
    data[i][:] = block(side, i)
for i in range(n):
    assert data[i] == block(side if i % (side + 1) == 0 else 0, i), (side, i)
if pid == 0:
    os._exit(0)
print(os.waitpid(pid, 0)[1], n)
";

const SQL: &str = "
create table t(a integer primary key, b text, c text);
with recursive n(i) as (select 1 union all select i + 1 from n where i < ROWS)
  insert into t select i, printf('%08x%08x', i * 2654435761 % 4294967296, i * 40503 % 65521),
    printf('%08x%08x%08x%08x%08x%08x', i * 2246822519 % 4294967296, i * 3266489917 % 4294967296,
      i * 668265263 % 4294967296, i * 374761393 % 4294967296, i * 2869860233 % 4294967296, i * 3373259426 % 4294967296)
  from n;
create index by_b on t(b);
select count(*), sum(a), sum(length(c)), min(b), max(b) from t;
update t set c = upper(c) where a % 5 = 0;
select count(*) from t where c = upper(c);
pragma integrity_check;
";

const PERL: &str = "
my %h;
for my $i (1 .. KEYS) { $h{\"key$i\"} = ($i * 2654435761 % 4294967296) . 'value' x 8; }
my ($n, $sum) = (0, 0);
for my $i (1 .. KEYS) {
    my $v = $h{\"key$i\"};
    die \"$i\" unless $v eq ($i * 2654435761 % 4294967296) . 'value' x 8;
    $n++; $sum += length $v;
}
print \"$n $sum\\n\";
";

fn write_lines(path: &Path, count: u64) {
    let mut file = BufWriter::new(File::create(path).expect("a file"));
    let mut rng = Rng::new(7);
    for number in 0..count {
        writeln!(file, "{:016x} {number}", rng.word()).expect("room on the disk");
    }
    file.flush().expect("room on the disk");
}

/// Random bytes, each MiB once more further on.
fn write_blocks(path: &Path, mib: u64) {
    let mut file = BufWriter::new(File::create(path).expect("a file"));
    for number in 0..mib {
        let mut rng = Rng::new(number - number / 8 % 2 * 8);
        for _ in 0..1 << 17 {
            file.write_all(&rng.word().to_le_bytes()).expect("room on the disk");
        }
    }
    file.flush().expect("room on the disk");
}
