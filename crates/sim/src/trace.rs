//! What happened, for the person who reads a failing seed. Costs nothing unless it is wanted.

use crate::agenda::Moment;
use std::collections::VecDeque;

/// How much of the story is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Verbosity {
    /// Nothing: campaigns run so, and run a failing seed again to hear its story.
    #[default]
    Silent,
    /// The last lines, printed when the seed fails.
    Tail,
    /// Every line, printed as it happens.
    Everything,
}

/// The story so far, as much of it as was asked for.
#[derive(Debug)]
pub struct Trace {
    verbosity: Verbosity,
    lines: VecDeque<String>,
}

impl Trace {
    const TAIL: usize = 400;

    pub fn new(verbosity: Verbosity) -> Trace {
        Trace { verbosity, lines: VecDeque::new() }
    }

    pub fn is_on(&self) -> bool {
        self.verbosity != Verbosity::Silent
    }

    pub fn note(&mut self, at: Moment, line: impl FnOnce() -> String) {
        match self.verbosity {
            Verbosity::Silent => {}
            Verbosity::Tail => {
                if self.lines.len() == Self::TAIL {
                    self.lines.pop_front();
                }
                self.lines.push_back(format!("{at}  {}", line()));
            }
            Verbosity::Everything => println!("{at}  {}", line()),
        }
    }

    pub fn tail(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().map(String::as_str)
    }
}
