//! Finds streams among faults: forward, backward, and with a stride. Any number of threads and interleaved streams: a
//! stream is known by where it will fault next, not by who faults.
//!
//! What was asked for and never reached shows when a stream makes room for another: where that is much, windows stay
//! small.

/// Streams followed at once; the one that advanced longest ago makes room.
const STREAMS: usize = 64;
/// First window, in pages.
const FIRST: u64 = 8;
/// Widest stride, in pages.
const STRIDE: u64 = 64;
/// Pages asked for after which what is long ago counts half.
const FADE: u64 = 4096;

/// A stream in a region.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    region: u16,
    /// A fault from here to `end` belongs to this stream.
    next: u64,
    /// What has been asked for ends before this one.
    pub end: u64,
    /// Pages from one fault to the next; negative towards lower addresses.
    pub step: i64,
    /// Pages to ask for at a time; zero before the stream has been confirmed.
    pub window: u64,
    /// It is first touches: nothing was read.
    pub fills: bool,
    /// Distance of the last two faults, while that is not yet a stride.
    delta: i64,
    used: u64,
}

impl Stream {
    const NONE: Self =
        Self { region: 0, next: u64::MAX, end: 0, step: 1, window: 0, fills: false, delta: 0, used: 0 };

    /// How many steps a fault on `index` is beyond the next one, if it belongs to the stream.
    fn steps_to(&self, index: u64) -> Option<u64> {
        let ahead = i64::try_from(index).ok()?.checked_sub(i64::try_from(self.next).ok()?)?;
        let steps = u64::try_from(ahead.checked_div(self.step)?).ok()?;
        (ahead % self.step == 0 && steps <= self.ahead()).then_some(steps)
    }

    /// Pages that were asked for, from the next one on.
    #[must_use]
    pub fn ahead(&self) -> u64 {
        let ahead = i64::try_from(self.end).unwrap_or(0) - i64::try_from(self.next).unwrap_or(i64::MAX);
        u64::try_from(ahead / self.step).unwrap_or(0)
    }

    /// The next window: twice the last, at most `max` pages.
    pub fn grow(&mut self, max: u64) -> u64 {
        self.window = (self.window * 2).max(FIRST).min(max.max(1));
        self.window
    }
}

/// The streams of one client.
#[derive(Debug)]
pub struct Streams {
    streams: [Stream; STREAMS],
    clock: u64,
    /// Pages asked for lately, and those of them that nobody came for.
    asked: u64,
    missed: u64,
    /// All that nobody came for.
    unused: u64,
}

impl Default for Streams {
    fn default() -> Self {
        Self { streams: [Stream::NONE; STREAMS], clock: 0, asked: 0, missed: 0, unused: 0 }
    }
}

impl Streams {
    /// Notes a fault on page `index`. Gives the stream that it advances; None where it starts a new one.
    pub fn advance(&mut self, region: u16, index: u64) -> Option<&mut Stream> {
        self.clock += 1;
        let used = self.clock;
        let mine = |s: &Stream| s.region == region && s.next != u64::MAX;
        if let Some(found) = self.streams.iter().position(|s| mine(s) && s.steps_to(index).is_some()) {
            let stream = &mut self.streams[found];
            stream.used = used;
            stream.next = index.saturating_add_signed(stream.step);
            if stream.ahead() == 0 {
                stream.end = stream.next;
            }
            return Some(stream);
        }
        // A stride shows at the third fault: twice the same distance.
        let near =
            |s: &Stream| mine(s) && s.window == 0 && s.step == 1 && (s.next - 1).abs_diff(index) <= STRIDE;
        let candidates = (0..STREAMS).filter(|place| near(&self.streams[*place]));
        if let Some(found) = candidates.max_by_key(|place| self.streams[*place].used) {
            let stream = &mut self.streams[found];
            let last = stream.next - 1;
            let delta = i64::try_from(index).unwrap_or(0) - i64::try_from(last).unwrap_or(0);
            if delta == stream.delta && delta != 0 {
                let next = index.saturating_add_signed(delta);
                *stream = Stream { next, end: next, step: delta, used, ..*stream };
                return Some(stream);
            }
            *stream = Stream { next: index + 1, end: index + 1, delta, used, ..*stream };
            return None;
        }
        let oldest = (0..STREAMS).min_by_key(|place| self.streams[*place].used).unwrap_or(0);
        self.end(oldest);
        self.streams[oldest] = Stream { region, next: index + 1, end: index + 1, used, ..Stream::NONE };
        None
    }

    /// The stream that a fault on `index` has just advanced.
    pub fn last(&mut self, region: u16) -> Option<&mut Stream> {
        let clock = self.clock;
        self.streams.iter_mut().find(|s| s.used == clock && s.region == region)
    }

    /// Notes that pages were asked for ahead of a stream.
    pub fn asked(&mut self, pages: u64) {
        self.asked += pages;
        if self.asked > FADE {
            (self.asked, self.missed) = (self.asked / 2, self.missed / 2);
        }
    }

    /// The widest window that readahead deserves, of at most `max` pages: an eighth while more than a quarter of what it
    /// brings is not used.
    #[must_use]
    pub fn widest(&self, max: u64) -> u64 {
        if self.missed * 4 > self.asked.max(FADE / 8) { (max / 8).max(1) } else { max }
    }

    /// Pages that were asked for ahead of streams that never came to them.
    #[must_use]
    pub fn unused(&self) -> u64 {
        self.unused
    }

    fn end(&mut self, place: usize) {
        let stream = std::mem::replace(&mut self.streams[place], Stream::NONE);
        if stream.window > 0 && !stream.fills {
            self.missed += stream.ahead();
            self.unused += stream.ahead();
        }
    }

    /// Forgets a region's streams.
    pub fn forget(&mut self, region: u16) {
        for stream in self.streams.iter_mut().filter(|stream| stream.region == region) {
            *stream = Stream::NONE;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn confirmed(streams: &mut Streams, faults: &[u64]) -> Option<Stream> {
        faults.iter().fold(None, |_, index| streams.advance(1, *index).map(|stream| *stream))
    }

    #[test]
    fn streams_go_forward_backward_and_by_strides() {
        let step = |faults: &[u64]| confirmed(&mut Streams::default(), faults).map(|stream| stream.step);
        assert_eq!(step(&[100]), None);
        assert_eq!(step(&[100, 101]), Some(1));
        assert_eq!(step(&[100, 99]), None);
        assert_eq!(step(&[100, 99, 98]), Some(-1));
        assert_eq!(step(&[100, 116, 132]), Some(16));
        assert_eq!(step(&[100, 60, 20]), Some(-40));
        assert_eq!(step(&[100, 116, 131]), None);
        assert_eq!(step(&[100, 1000, 1900]), None, "too wide for a stride");
    }

    #[test]
    fn a_stream_is_known_by_where_it_comes_to_next() {
        let mut streams = Streams::default();
        let mut stream = confirmed(&mut streams, &[10, 9, 8]).unwrap();
        assert_eq!((stream.ahead(), stream.end), (0, 7));
        streams.last(1).unwrap().end = 3;
        streams.last(1).unwrap().window = 4;
        stream = *streams.advance(1, 5).unwrap();
        assert_eq!((stream.step, stream.ahead()), (-1, 1), "two pages further on than it was");
        assert!(streams.advance(2, 4).is_none(), "another region");
        assert!(confirmed(&mut streams, &[500, 501]).is_some());
        assert_eq!(streams.advance(1, 4).unwrap().step, -1, "streams may be interleaved");
    }

    #[test]
    fn windows_stay_small_where_readahead_is_in_vain() {
        let mut streams = Streams::default();
        assert_eq!(streams.widest(256), 256);
        for n in 0..200 {
            let start = 10_000 + n * 1000;
            assert!(confirmed(&mut streams, &[start, start + 1]).is_some());
            let stream = streams.last(1).unwrap();
            stream.window = 32;
            stream.end += 32;
            streams.asked(32);
        }
        assert_eq!(streams.widest(256), 32);
        assert_eq!(streams.unused(), (200 - 64) * 32);
        // A long stream that is followed to its end makes up for it.
        for index in 0..40_000 {
            streams.advance(2, index);
            if let Some(stream) = streams.last(2).filter(|stream| stream.ahead() == 0) {
                stream.end += 64;
                streams.asked(64);
            }
        }
        assert_eq!(streams.widest(256), 256);
    }
}
