//! Bounds on connections, clients and RAM, and what is handed over within them.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::time::{Duration, Instant};

use fmalloc_proto::hello::Role;
use fmalloc_proto::limits::MIN_BUDGET;
use fmalloc_proto::messages::{Budget, ClientRow, Empty, ErrorCode, Page, Reply, Request};
use fmalloc_proto::ring::{Layout, Ring};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::support::{Daemon, MIB, Peer, Place, command, wait_until};

fn rows(daemon: &Daemon) -> Vec<ClientRow> {
    match daemon.connect(Role::Control).ask(&Request::Clients(Page { after: 0 })) {
        Reply::Clients(list) => list.rows,
        other => panic!("unexpected {other:?}"),
    }
}

#[test]
fn connections_beyond_the_limit_are_refused_until_others_end() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let most = 3000.min(usize::try_from(hard).unwrap() / 2);
    let daemon = Daemon::start(&["--max-clients", "100", "--max-connections", &most.to_string()]);
    let mut peers: Vec<Peer> = (0..most).map(|_| daemon.connect(Role::Control)).collect();
    let refused = daemon.connect(Role::Control);
    refused.send(1, &Request::Ping(Empty {}), &[]);
    let failure = refused.assert_ended(ErrorCode::Limit);
    assert!(failure.text.contains(&most.to_string()), "{}", failure.text);
    // Those inside are served as before.
    for peer in peers.iter().step_by(100) {
        assert_eq!(peer.ask(&Request::Ping(Empty {})), Reply::Done(Empty {}));
    }
    peers.clear();
    wait_until("there is room again", || {
        let peer = daemon.connect(Role::Control);
        peer.ask(&Request::Ping(Empty {})) == Reply::Done(Empty {})
    });
}

#[test]
fn clients_beyond_the_limits_are_refused() {
    let daemon = Daemon::start(&["--max-clients", "3", "--max-clients-per-uid", "2"]);
    let first = daemon.connect(Role::Pager);
    first.open(MIN_BUDGET).unwrap();
    let second = daemon.connect(Role::Pager);
    second.open(MIN_BUDGET).unwrap();
    let third = daemon.connect(Role::Pager);
    let failure = third.open(MIN_BUDGET).unwrap_err();
    assert_eq!(failure.code, ErrorCode::Limit);
    assert!(failure.text.contains("max_clients_per_uid"), "{}", failure.text);
    drop(second);
    wait_until("the second has left", || rows(&daemon).len() == 1);
    daemon.connect(Role::Pager).open(MIN_BUDGET).unwrap();
}

#[test]
fn groups_of_one_process_or_user_are_bounded() {
    let most = |args: &[&str]| {
        let daemon = Daemon::start(args);
        let make = || daemon.connect(Role::Control).ask(&Request::NewGroup(Budget { bytes: MIN_BUDGET }));
        let made = (0..20).take_while(|_| matches!(make(), Reply::Group(_))).count();
        let Reply::Error(failure) = make() else { panic!("20 groups and more") };
        assert_eq!(failure.code, ErrorCode::Limit);
        (made, failure.text)
    };
    let (made, text) = most(&[]);
    assert!(made == 8 && text.contains("this process"), "{made}: {text}");
    let (made, text) = most(&["--max-clients-per-uid", "2"]);
    assert!(made == 2 && text.contains("max_clients_per_uid"), "{made}: {text}");
}

#[test]
fn budgets_never_add_up_to_more_than_the_pool() {
    let daemon = Daemon::start(&[]);
    let first = daemon.connect(Role::Pager);
    assert_eq!(first.open(200 * MIB).unwrap().0.budget, 200 * MIB);
    let failure = daemon.connect(Role::Pager).open(57 * MIB).unwrap_err();
    assert_eq!(failure.code, ErrorCode::PoolFull);
    for figure in ["57 MiB", "200 MiB", "256 MiB", "56 MiB"] {
        assert!(failure.text.contains(figure), "{figure} in {}", failure.text);
    }
    let second = daemon.connect(Role::Pager);
    second.open(56 * MIB).unwrap();
    assert_eq!(daemon.connect(Role::Pager).open(MIN_BUDGET).unwrap_err().code, ErrorCode::PoolFull);
    drop(first);
    wait_until("the first has left", || rows(&daemon).len() == 1);
    daemon.connect(Role::Pager).open(200 * MIB).unwrap();
}

#[test]
fn budget_of_nothing_is_the_default_and_others_have_bounds() {
    let daemon = Daemon::start(&["--default-budget", "24M", "--max-budget", "32M"]);
    let peer = daemon.connect(Role::Pager);
    assert_eq!(peer.open(0).unwrap().0.budget, 24 * MIB);
    assert_eq!(daemon.connect(Role::Pager).open(33 * MIB).unwrap_err().code, ErrorCode::Limit);
    assert_eq!(daemon.connect(Role::Pager).open(MIN_BUDGET - 1).unwrap_err().code, ErrorCode::Invalid);
    let rows = rows(&daemon);
    assert_eq!((rows.len(), rows[0].name.as_str(), rows[0].pid), (1, "test", std::process::id()));
    assert_eq!(rows[0].stats.budget_bytes, 24 * MIB);
}

#[test]
fn opened_client_gets_a_valid_ring_doorbells_and_device() {
    let daemon = Daemon::start(&[]);
    let peer = daemon.connect(Role::Pager);
    let (opened, fds) = peer.open(64 * MIB).unwrap();
    assert_eq!(fds.len(), 3 + usize::from(opened.device));
    let layout = Layout::new(opened.ring_batches, opened.ring_batch_pages).unwrap();
    assert!(Ring::map(fds[0].as_fd(), layout).unwrap().is_valid());
    for doorbell in &fds[1..3] {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(doorbell)));
        assert_eq!(link.unwrap().to_str(), Some("anon_inode:[eventfd]"));
    }
    if let Some(device) = fds.into_iter().nth(3) {
        assert!(File::from(device).metadata().unwrap().file_type().is_char_device());
    }
}

#[test]
fn want_of_descriptors_neither_kills_nor_spins() {
    use std::os::unix::process::CommandExt;
    let place = Place::new();
    let mut command = command(&place, &[]);
    // SAFETY: between fork and exec only setrlimit is called.
    unsafe {
        command.pre_exec(|| Ok(setrlimit(Resource::RLIMIT_NOFILE, 100, 100)?));
    }
    let daemon = Daemon::run(command, place);
    let peers: Vec<_> =
        (0..200).map(|_| fmalloc_proto::transport::connect(&daemon.place.socket()).unwrap()).collect();
    let before = daemon.cpu_ticks();
    std::thread::sleep(Duration::from_secs(1));
    let ticks = daemon.cpu_ticks() - before;
    assert!(ticks < 30, "{ticks} ticks of a hundredth of a second");
    drop(peers);
    daemon.assert_alive();
}

#[test]
fn long_lists_come_page_by_page() {
    let daemon = Daemon::start(&["--ram", "1G"]);
    let clients: Vec<Peer> = (0..150).map(|_| daemon.connect(Role::Pager)).collect();
    for client in &clients {
        client.open(MIN_BUDGET).unwrap();
    }
    let peer = daemon.connect(Role::Control);
    let (mut seen, mut after) = (Vec::new(), 0);
    loop {
        let Reply::Clients(list) = peer.ask(&Request::Clients(Page { after })) else { panic!() };
        seen.extend(list.rows.iter().map(|row| row.client));
        if !list.more {
            break;
        }
        after = *seen.last().unwrap();
    }
    assert!(seen.into_iter().eq(1..=150));
}

#[test]
fn peer_that_says_nothing_is_dropped() {
    let daemon = Daemon::start(&[]);
    let start = Instant::now();
    let (silent, greeted) = (Peer::silent(&daemon.place.socket()), daemon.connect(Role::Pager));
    silent.assert_closed();
    greeted.assert_closed();
    let waited = start.elapsed();
    assert!((4..8).contains(&waited.as_secs()), "{waited:?}");
    // A tool may take its time between requests.
    let tool = daemon.connect(Role::Control);
    std::thread::sleep(Duration::from_millis(5500));
    assert_eq!(tool.ask(&Request::Ping(Empty {})), Reply::Done(Empty {}));
}
