//! `fmalloc-bench`: see `fmalloc_tests::bench`.

fn main() -> std::process::ExitCode {
    fmalloc_tests::bench::main()
}
