//! A pager and its regions against a stand-in for the daemon: what is said, in which order, and what becomes of it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test says so by ending")]

mod double;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::thread;

use double::{BUDGET, CLIENT, Double, alone, eventually, in_child, threads_named};
use fmalloc_client::{Advice, ConnectOptions, Error, ErrorCode, Health, Pager, Region};
use fmalloc_proto::messages::{Budget, ClientStats, Empty, Failure, Reply, Request};

const PAGE: usize = fmalloc_client::PAGE_SIZE;

#[test]
fn a_session_opens_works_and_leaves_nothing_behind() {
    let _alone = alone();
    let double = Double::friendly();
    let pager = double.connect().unwrap();
    assert_eq!((pager.client_id(), pager.budget(), pager.health()), (CLIENT, BUDGET, Health::Ok));
    assert_eq!(pager.stats().unwrap().budget_bytes, BUDGET);
    assert_eq!(pager.set_budget(16 << 20).unwrap(), 16 << 20);
    assert_eq!(pager.budget(), 16 << 20);
    assert!(matches!(pager.set_budget(1), Err(Error::Invalid { .. })), "not even sent");
    assert_eq!(threads_named("fmalloc-agent").len(), 1);
    let region = Region::new(&pager, 100).unwrap();
    drop(pager);
    assert_eq!(region.pager().stats().unwrap().budget_bytes, BUDGET, "a region keeps its pager");
    drop(region);
    double.join();
    eventually("the end of the threads", || {
        threads_named("fmalloc-agent").is_empty() && threads_named("fmalloc-herald").is_empty()
    });
}

#[test]
fn regions_have_the_length_asked_for_and_live_in_whole_pages() {
    let _alone = alone();
    let (sender, receiver) = channel();
    let double = Double::start(move |peer, id, request| {
        let reply = peer.usual(&request);
        sender.send(request).unwrap();
        peer.reply(id, &reply);
        true
    });
    let pager = double.connect().unwrap();
    for (len, kind) in [(0, "empty"), (usize::MAX, "endless"), ((1 << 46) + 1, "too long")] {
        assert!(matches!(Region::new(&pager, len), Err(Error::Invalid { .. })), "{kind}");
    }
    let mut region = Region::labelled(&pager, 3 * PAGE + 10, "my\nlabel").unwrap();
    let Request::Register(register) = receiver.recv().unwrap() else { panic!() };
    assert_eq!((register.len, register.commit, register.label.as_str()), (4 * PAGE as u64, true, "my label"));
    assert_eq!(register.addr, region.as_ptr().addr() as u64);
    assert_eq!((region.len(), region.id(), region.is_empty()), (3 * PAGE + 10, 1, false));
    assert_eq!(region.as_slice_of::<u64>().len(), (3 * PAGE + 10) / 8);
    assert!(region.as_slice_of::<[u8; 0]>().is_empty());

    region.fill(1);
    assert_eq!(region.resident(0..region.len()).unwrap(), [true; 4]);
    region.discard(10..2 * PAGE + 5).unwrap();
    assert!(region[..10].iter().chain(&region[2 * PAGE + 5..]).all(|byte| *byte == 1));
    assert!(region[10..2 * PAGE + 5].iter().all(|byte| *byte == 0));
    region.discard(3 * PAGE + 2..3 * PAGE + 10).unwrap();
    assert_eq!(region[3 * PAGE..], [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    region.fill(1);
    region.discard(0..region.len()).unwrap();
    assert_eq!(region.resident(0..region.len()).unwrap(), [false; 4], "the last page counts as whole");
    region.as_mut_slice_of::<u32>()[1] = 0x0102_0304;
    assert_eq!(region[4..8], 0x0102_0304_u32.to_ne_bytes());
    #[allow(clippy::reversed_empty_ranges, reason = "that is what is tested")]
    for range in [5..4, 0..region.len() + 1, usize::MAX..usize::MAX] {
        assert!(matches!(region.discard(range.clone()), Err(Error::Invalid { .. })), "{range:?}");
        assert!(region.resident(range).is_err());
    }

    region.advise(PAGE + 1..PAGE + 2, Advice::Cold).unwrap();
    let Request::Advise(advise) = receiver.recv().unwrap() else { panic!() };
    assert_eq!(
        (advise.range.offset, advise.range.len, advise.advice),
        (PAGE as u64, PAGE as u64, Advice::Cold)
    );
    region.advise(7..7, Advice::Cold).unwrap();
    drop(region);
    assert!(matches!(receiver.recv().unwrap(), Request::Unregister(_)));
    drop(pager);
    assert!(matches!(receiver.recv().unwrap(), Request::Goodbye(_)));
    double.join();
}

#[test]
fn sparse_regions_are_usable_where_committed() {
    let _alone = alone();
    let double = Double::start(|peer, id, request| {
        let reply = match &request {
            Request::Commit(range) if range.offset >= 64 << 20 => refusal(ErrorCode::SwapFull),
            _ => peer.usual(&request),
        };
        peer.reply(id, &reply);
        true
    });
    let pager = double.connect().unwrap();
    let mut region = Region::sparse(&pager, 1 << 40).unwrap();
    region.commit(PAGE + 1..2 * PAGE + 1).unwrap();
    region[PAGE] = 1;
    region[3 * PAGE - 1] = 2;
    assert!(matches!(region.commit(64 << 20..65 << 20), Err(Error::SwapFull { .. })));
    let touch = |offset: usize| {
        let (_reader, writer) = nix::unistd::pipe().unwrap();
        // SAFETY: the kernel checks the access; that is what is asked.
        unsafe {
            libc::write(std::os::fd::AsRawFd::as_raw_fd(&writer), region.as_ptr().add(offset).cast(), 1) == 1
        }
    };
    assert!(touch(PAGE) && touch(2 * PAGE));
    assert!(!touch(0) && !touch(3 * PAGE) && !touch(64 << 20));
    region.decommit(PAGE..2 * PAGE + 5).unwrap();
    assert_eq!(region[3 * PAGE - 1], 2);
    region.commit(PAGE..2 * PAGE).unwrap();
    assert_eq!(region[PAGE], 0, "content was dropped");
}

#[test]
fn refusals_become_errors_that_a_program_can_tell_apart() {
    let _alone = alone();
    let codes = [ErrorCode::SwapFull, ErrorCode::PoolFull, ErrorCode::Denied, ErrorCode::Limit];
    let mut turn = codes.into_iter();
    let double = Double::start(move |peer, id, request| {
        let reply = match request {
            Request::Register(_) => refusal(turn.next().unwrap()),
            other => peer.usual(&other),
        };
        peer.reply(id, &reply);
        true
    });
    let pager = double.connect().unwrap();
    assert!(matches!(Region::new(&pager, 1), Err(Error::SwapFull { text }) if text == "figures"));
    assert!(matches!(Region::new(&pager, 1), Err(Error::PoolFull { .. })));
    assert!(matches!(Region::new(&pager, 1), Err(Error::Denied { .. })));
    assert!(matches!(Region::new(&pager, 1), Err(Error::Refused { code: ErrorCode::Limit, .. })));
    assert_eq!(pager.health(), Health::Ok);
    drop(pager);
    double.join();
}

#[test]
fn requests_of_many_threads_are_answered_in_any_order() {
    let _alone = alone();
    const THREADS: u64 = 8;
    let mut held = Vec::new();
    let double = Double::start(move |peer, id, request| {
        let Request::SetBudget(Budget { bytes }) = request else {
            let reply = peer.usual(&request);
            peer.reply(id, &reply);
            return true;
        };
        held.push((id, bytes));
        if held.len() as u64 == THREADS {
            peer.reply(0, &Reply::Done(Empty {}));
            for (id, bytes) in held.drain(..).rev() {
                peer.reply(id, &Reply::Budget(Budget { bytes }));
            }
        }
        true
    });
    let pager = double.connect().unwrap();
    thread::scope(|scope| {
        for number in 1..=THREADS {
            let pager = &pager;
            scope.spawn(move || {
                for round in 1..200 {
                    let bytes = (number << 32) + (round << 23);
                    assert_eq!(pager.set_budget(bytes).unwrap(), bytes);
                }
            });
        }
    });
    drop(pager);
    double.join();
}

#[test]
fn the_agent_answers_the_ring_while_a_control_reply_is_awaited() {
    let _alone = alone();
    let double = Double::start(|peer, id, request| {
        let mut reply = peer.usual(&request);
        if let Request::Stats(_) = request {
            let (addr, len) = peer.regions[&1];
            let addrs: Vec<u64> = (addr..addr + len).step_by(PAGE).collect();
            let present = peer.probe(&addrs).into_iter().filter(|result| *result == 5).count();
            reply = Reply::Stats(ClientStats { resident_pages: present as u64, ..Default::default() });
        }
        peer.reply(id, &reply);
        true
    });
    let pager = double.connect().unwrap();
    let mut region = Region::new(&pager, 10 * PAGE).unwrap();
    assert_eq!(pager.stats().unwrap().resident_pages, 0);
    for page in 0..4 {
        region[page * 2 * PAGE] = 1;
    }
    assert_eq!(pager.stats().unwrap().resident_pages, 4);
}

#[test]
fn a_notice_changes_the_budget() {
    let _alone = alone();
    let double = Double::start(|peer, id, request| {
        let reply = peer.usual(&request);
        if let Request::Stats(_) = request {
            peer.reply(0, &Reply::Budget(Budget { bytes: 5 << 20 }));
        }
        peer.reply(id, &reply);
        true
    });
    let pager = double.connect().unwrap();
    assert_eq!(pager.budget(), BUDGET);
    pager.stats().unwrap();
    assert_eq!(pager.budget(), 5 << 20);
}

#[test]
fn a_forked_child_is_told_and_harms_nothing() {
    let _alone = alone();
    let double = Double::friendly();
    let pager = double.connect().unwrap();
    let mut region = Region::new(&pager, 2 * PAGE).unwrap();
    region[0] = 9;
    let (pager, mut region) = {
        let in_parent = (pager, region);
        in_child(|| {
            // SAFETY: moves the values into the child, which is a copy of this process; the parent keeps its own.
            let (pager, mut region) = unsafe { std::ptr::read(&raw const in_parent) };
            assert_eq!(pager.health(), Health::Forked);
            assert!(matches!(pager.stats(), Err(Error::Forked)));
            assert!(matches!(pager.set_budget(8 << 20), Err(Error::Forked)));
            assert!(matches!(Region::new(&pager, PAGE), Err(Error::Forked)));
            assert!(matches!(region.discard(0..PAGE), Err(Error::Forked)));
            assert!(matches!(region.commit(0..PAGE), Err(Error::Forked)));
            assert!(matches!(region.resident(0..PAGE), Err(Error::Forked)));
            let mut present = 0_u8;
            // SAFETY: the kernel checks the range.
            let mapped = unsafe { libc::mincore(region.as_ptr().cast(), PAGE, &raw mut present) };
            assert_eq!(mapped, -1, "the child has no mapping there");
            drop(region);
            drop(pager);
        });
        in_parent
    };
    assert_eq!(region[0], 9);
    region.discard(0..PAGE).unwrap();
    assert_eq!(pager.health(), Health::Ok);
    drop((pager, region));
    double.join();
}

#[test]
fn the_application_keeps_its_own_sigurg() {
    static CAUGHT: AtomicU32 = AtomicU32::new(0);
    extern "C" fn catch(_: i32) {
        CAUGHT.fetch_add(1, Ordering::Relaxed);
    }
    let _alone = alone();
    let double = Double::friendly();
    let pager = double.connect().unwrap();
    // SAFETY: the handler only counts.
    let before = unsafe { libc::signal(libc::SIGURG, catch as *const () as libc::sighandler_t) };
    for round in 0..300 {
        let seen = CAUGHT.load(Ordering::Relaxed);
        // SAFETY: signals this process.
        unsafe { libc::kill(libc::getpid(), libc::SIGURG) };
        if round % 3 == 0 {
            pager.stats().unwrap();
        }
        eventually("the signal", || CAUGHT.load(Ordering::Relaxed) > seen);
    }
    let caught = CAUGHT.load(Ordering::Relaxed);
    for _ in 0..300 {
        pager.stats().unwrap();
    }
    assert_eq!(CAUGHT.load(Ordering::Relaxed), caught, "the agent's own wake-ups do not show");
    // SAFETY: as it was.
    unsafe { libc::signal(libc::SIGURG, before) };
    drop(pager);
    double.join();
}

#[test]
fn users_without_rights_are_told_what_helps() {
    const NOBODY: u32 = 65534;
    let _alone = alone();
    // SAFETY: asks for a number.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("skipped: only root can become somebody else");
        return;
    }
    let as_nobody = |work: &dyn Fn()| {
        in_child(|| {
            // SAFETY: gives up rights for good, in the child.
            assert_eq!(unsafe { libc::setuid(NOBODY) }, 0);
            work();
        });
    };
    let double = Double::friendly();
    as_nobody(&|| {
        let error = double.connect().unwrap_err();
        assert!(matches!(&error, Error::Denied { text } if text.contains("group")), "{error}");
    });
    double.admit_everybody();
    as_nobody(&|| match Pager::connect_with(&double.options(false)) {
        // Where the sysctl or the device node lets everybody.
        Ok(pager) => assert_eq!(pager.health(), Health::Ok),
        Err(error) => {
            assert!(matches!(error, Error::NoUserfaultfd { .. }), "{error}");
            let text = error.to_string();
            assert!(
                ["service", "group", "vm.unprivileged_userfaultfd"].iter().all(|help| text.contains(help))
            );
        }
    });
    double.join();
    let double = Double::friendly();
    double.admit_everybody();
    as_nobody(&|| {
        let pager = double.connect().unwrap();
        let mut region = Region::new(&pager, PAGE).unwrap();
        region.fill(1);
    });
    double.join();
}

#[test]
fn without_a_daemon_the_error_names_every_place() {
    let _alone = alone();
    let options = ConnectOptions { socket: Some("/nonexistent/sock".into()), ..Default::default() };
    let error = Pager::connect_with(&options).unwrap_err();
    assert!(matches!(&error, Error::NoDaemon { tried } if tried.len() == 1));
    let text = error.to_string();
    assert!(text.contains("/nonexistent/sock") && text.contains("Pager::private"), "{text}");
}

#[test]
fn a_daemon_that_speaks_another_version_or_hangs_up_is_told() {
    let _alone = alone();
    for reply in [&[0_u8; 16][..], b"FMALLOC\0\0\0\x07\0\x09\0\0\0"] {
        let path = std::env::temp_dir().join(format!("fmalloc-old-{}", std::process::id()));
        let error = talk_once(&path, reply);
        assert!(matches!(error, Error::Conversation { .. }), "{error}");
    }
}

fn talk_once(path: &std::path::Path, reply: &[u8]) -> Error {
    use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
    use std::os::fd::{AsRawFd, BorrowedFd};
    let listener =
        socket::socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    let _ = std::fs::remove_file(path);
    socket::bind(listener.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    socket::listen(&listener, Backlog::new(1).unwrap()).unwrap();
    let options = ConnectOptions { socket: Some(path.to_owned()), ..Default::default() };
    let client = thread::spawn(move || Pager::connect_with(&options).unwrap_err());
    let raw = socket::accept(listener.as_raw_fd()).unwrap();
    // SAFETY: just made for us.
    let peer = unsafe { BorrowedFd::borrow_raw(raw) };
    fmalloc_proto::transport::send(peer, reply, &[]).unwrap();
    let error = client.join().unwrap();
    // SAFETY: ours.
    unsafe { libc::close(raw) };
    std::fs::remove_file(path).unwrap();
    error
}

fn refusal(code: ErrorCode) -> Reply {
    Reply::Error(Failure { code, text: "figures".to_owned() })
}
