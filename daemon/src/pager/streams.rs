//! Finds sequential streams among faults. Any number of threads and interleaved streams: a stream is known by where it
//! will fault next, not by who faults.

/// Streams followed at once; the one that advanced longest ago makes room.
const STREAMS: usize = 64;
/// First window, in pages.
const FIRST: u64 = 8;

/// A stream in a region.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    region: u16,
    /// A fault from here to `end` belongs to this stream.
    next: u64,
    /// What has been asked for ends here.
    pub end: u64,
    /// Pages to ask for at a time; zero before the stream has been confirmed.
    pub window: u64,
    used: u64,
}

/// The streams of one client.
#[derive(Debug)]
pub struct Streams {
    streams: [Stream; STREAMS],
    clock: u64,
}

impl Default for Streams {
    fn default() -> Self {
        let none = Stream { region: 0, next: u64::MAX, end: 0, window: 0, used: 0 };
        Self { streams: [none; STREAMS], clock: 0 }
    }
}

impl Streams {
    /// Notes a fault on page `index`. Gives the stream that it advances; None where it starts a new one.
    pub fn advance(&mut self, region: u16, index: u64) -> Option<&mut Stream> {
        self.clock += 1;
        let found = self
            .streams
            .iter()
            .position(|s| s.region == region && s.next <= index && index <= s.end.max(s.next));
        let Some(found) = found else {
            let oldest = (0..STREAMS).min_by_key(|place| self.streams[*place].used).unwrap_or(0);
            let used = self.clock;
            self.streams[oldest] = Stream { region, next: index + 1, end: index + 1, window: 0, used };
            return None;
        };
        let stream = &mut self.streams[found];
        stream.used = self.clock;
        stream.next = index + 1;
        stream.end = stream.end.max(index + 1);
        Some(stream)
    }

    /// The stream that a fault on `index` has just advanced.
    pub fn last(&mut self, region: u16, index: u64) -> Option<&mut Stream> {
        let clock = self.clock;
        self.streams.iter_mut().find(|s| s.used == clock && s.region == region && s.next == index + 1)
    }

    /// Forgets a region's streams.
    pub fn forget(&mut self, region: u16) {
        for stream in self.streams.iter_mut().filter(|stream| stream.region == region) {
            *stream = Stream { region: 0, next: u64::MAX, end: 0, window: 0, used: 0 };
        }
    }
}

impl Stream {
    /// The next window: twice the last, at most `max` pages.
    pub fn grow(&mut self, max: u64) -> u64 {
        self.window = (self.window * 2).max(FIRST).min(max.max(1));
        self.window
    }
}
