//! Requests that decode but make no sense are refused, and the ones that do are not.

use fmalloc_proto::limits::{MAX_ADDRESS, MAX_NAME, MAX_REGION, MIN_BUDGET, PAGE};
use fmalloc_proto::messages::{
    Advice, Advise, Attach, Budget, Empty, Evict, Limit, Open, Page, RegionId, RegionRange, RegionsQuery,
    Register, Request, Staging,
};
use fmalloc_proto::validate::{Invalid, request};

fn open(name: &str, budget: u64) -> Request {
    Request::Open(Open { name: name.into(), budget, user_mode_only: false, group: None })
}

fn register(addr: u64, len: u64, label: &str) -> Request {
    Request::Register(Register { addr, len, commit: true, label: label.into() })
}

fn ranges(offset: u64, len: u64) -> [Request; 3] {
    let range = RegionRange { region: 1, offset, len };
    [
        Request::Commit(range),
        Request::Decommit(range),
        Request::Advise(Advise { range, advice: Advice::Cold }),
    ]
}

#[test]
fn names_within_limits_are_accepted() {
    for name in ["", "sort_lines", "größer", &"n".repeat(MAX_NAME)] {
        assert_eq!(request(&open(name, 0)), Ok(()));
        assert_eq!(request(&register(PAGE, PAGE, name)), Ok(()));
    }
}

#[test]
fn long_names_and_control_characters_are_refused() {
    let too_long = "ä".repeat(MAX_NAME / 2 + 1);
    for name in ["a\nb", "\x1b[2J", "\0", "\u{85}", &"n".repeat(MAX_NAME + 1), &too_long] {
        assert_eq!(request(&open(name, 0)), Err(Invalid::Name), "{name:?}");
        assert_eq!(request(&register(PAGE, PAGE, name)), Err(Invalid::Name), "{name:?}");
    }
}

#[test]
fn budgets_below_the_minimum_are_refused() {
    assert_eq!(request(&open("", 0)), Ok(()), "0 asks for the default");
    for bytes in [1, MIN_BUDGET - 1] {
        assert_eq!(request(&open("", bytes)), Err(Invalid::Budget(bytes)));
    }
    for bytes in [0, MIN_BUDGET - 1] {
        assert_eq!(request(&Request::SetBudget(Budget { bytes })), Err(Invalid::Budget(bytes)));
        assert_eq!(request(&Request::Limit(Limit { client: 1, bytes })), Err(Invalid::Budget(bytes)));
    }
    for bytes in [MIN_BUDGET, u64::MAX] {
        assert_eq!(request(&open("", bytes)), Ok(()));
        assert_eq!(request(&Request::SetBudget(Budget { bytes })), Ok(()));
        assert_eq!(request(&Request::Limit(Limit { client: 1, bytes })), Ok(()));
    }
}

#[test]
fn ranges_of_whole_pages_within_bounds_are_accepted() {
    for (offset, len) in [(0, PAGE), (PAGE, 5 * PAGE), (0, MAX_REGION), (MAX_REGION - PAGE, PAGE)] {
        for range in ranges(offset, len) {
            assert_eq!(request(&range), Ok(()), "{range:?}");
        }
    }
    for (addr, len) in [(PAGE, PAGE), (MAX_ADDRESS - PAGE, PAGE), (PAGE, MAX_REGION)] {
        assert_eq!(request(&register(addr, len, "")), Ok(()), "{addr:#x}+{len:#x}");
    }
}

#[test]
fn ranges_that_make_no_sense_are_refused() {
    for (start, len) in [
        (0, 0),
        (1, PAGE),
        (PAGE, 1),
        (PAGE - 1, PAGE + 1),
        (PAGE, u64::MAX),
        (u64::MAX - PAGE + 1, PAGE),
        (u64::MAX - PAGE + 1, u64::MAX - PAGE + 1),
        (1 << 63, 1 << 63),
        (MAX_ADDRESS, PAGE),
        (MAX_ADDRESS - PAGE, 2 * PAGE),
        (PAGE, MAX_REGION + PAGE),
    ] {
        let expected = Err(Invalid::Range { start, len });
        assert_eq!(request(&register(start, len, "")), expected);
        for range in ranges(start, len) {
            assert_eq!(request(&range), expected, "{range:?}");
        }
    }
    for range in ranges(MAX_REGION, PAGE) {
        assert!(request(&range).is_err(), "{range:?}");
    }
}

#[test]
fn staging_areas_are_whole_pages_of_the_user() {
    let attach = |addr, len| {
        request(&Request::Attach(Attach {
            agent_tid: 1,
            staging: Some(Staging { addr, len }),
            inherit: false,
        }))
    };
    assert_eq!(attach(PAGE, 64 * PAGE), Ok(()));
    for (addr, len) in
        [(PAGE, 0), (PAGE + 1, PAGE), (PAGE, 1), (MAX_ADDRESS, PAGE), (PAGE, u64::MAX - PAGE + 1)]
    {
        assert_eq!(attach(addr, len), Err(Invalid::Range { start: addr, len }));
    }
}

#[test]
fn requests_that_depend_on_state_alone_are_accepted() {
    for message in [
        Request::Attach(Attach { agent_tid: 0, staging: None, inherit: false }),
        Request::Unregister(RegionId { region: u32::MAX }),
        Request::Stats(Empty {}),
        Request::Goodbye(Empty {}),
        Request::Ping(Empty {}),
        Request::Status(Empty {}),
        Request::Clients(Page { after: u64::MAX }),
        Request::Regions(RegionsQuery { client: u64::MAX, from: u32::MAX }),
        Request::Evict(Evict { client: 1, region: None, bytes: Some(0) }),
    ] {
        assert_eq!(request(&message), Ok(()), "{message:?}");
    }
}
