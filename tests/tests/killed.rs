//! Clients that die at any moment.

use std::thread;
use std::time::Duration;

use fmalloc_tests::rng::{Rng, seed};
use fmalloc_tests::{Daemon, MIB};

#[test]
fn two_hundred_clients_killed_at_random_moments_give_everything_back() {
    const AT_ONCE: u64 = 4;
    let Some(daemon) = Daemon::start("64M", "512M") else { return };
    let mut bystander = daemon.client("8M");
    bystander.ask("region a 32M");
    bystander.ask("start churn churn a 1 2 0");
    let seed = seed();
    thread::scope(|scope| {
        for n in 0..AT_ONCE {
            let daemon = &daemon;
            scope.spawn(move || {
                let mut rng = Rng::new(seed + n);
                for _ in 0..200 / AT_ONCE {
                    let mut worker = daemon.worker();
                    for command in
                        ["connect 8M", "region a 24M", "region b 8M", "fill a 1 2", "churn b 1 3 0"]
                    {
                        worker.tell(command);
                    }
                    // Some are not connected by then, others write to swap.
                    thread::sleep(Duration::from_micros(rng.below(100_000)));
                    worker.kill();
                }
            });
        }
    });
    bystander.ask("stop churn");
    fmalloc_tests::wait_until("only the bystander is left", || {
        daemon.status("clients") == 1
            && daemon.status("swap_claimed_bytes") == 32 * MIB
            && daemon.status("pool_granted_bytes") == 8 * MIB
    });
    bystander.quit();
    daemon.wait_until_empty();
}
