//! Programs that block, run a step at a time on one thread: each on a stack of its own, switched wherever it calls a place.
//!
//! The code that is tested blocks, and nothing is changed in it. Threads that take turns would do, too, and cost a hundred times
//! as much for each turn.

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;

/// Bytes of a stack.
const STACK: usize = 256 * 1024;

type Switch = Yielder<(), ()>;

thread_local! {
    /// Of the fiber that runs now; null outside.
    static RUNNING: Cell<*const Switch> = const { Cell::new(std::ptr::null()) };
    /// Stacks to be used again: mapping one costs more than a whole fiber's life.
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
}

/// A program that stands still.
pub struct Fiber {
    coroutine: Option<Coroutine<(), (), ()>>,
    /// Where its own switch is, once it began.
    switch: Rc<Cell<*const Switch>>,
}

impl Fiber {
    pub fn new(program: impl FnOnce() + 'static) -> Fiber {
        let spare = STACKS.with_borrow_mut(Vec::pop);
        let stack = spare.unwrap_or_else(|| DefaultStack::new(STACK).expect("memory for a stack"));
        let switch = Rc::new(Cell::new(std::ptr::null()));
        let own = Rc::clone(&switch);
        let coroutine = Coroutine::with_stack(stack, move |yielder: &Switch, ()| {
            own.set(yielder);
            RUNNING.set(yielder);
            program();
        });
        Fiber { coroutine: Some(coroutine), switch }
    }

    /// Runs it to its next [`suspend`]. Whether it ended. A panic of it comes out here.
    pub fn resume(&mut self) -> bool {
        let coroutine = self.coroutine.as_mut().expect("it has not ended");
        RUNNING.set(self.switch.get());
        let result = coroutine.resume(());
        RUNNING.set(std::ptr::null());
        if matches!(result, CoroutineResult::Yield(())) {
            return false;
        }
        self.keep_stack();
        true
    }

    fn keep_stack(&mut self) {
        if let Some(coroutine) = self.coroutine.take()
            && coroutine.done()
        {
            STACKS.with_borrow_mut(|stacks| stacks.push(coroutine.into_stack()));
        }
    }
}

impl Drop for Fiber {
    /// A crash: it never does anything again. What it holds is dropped.
    fn drop(&mut self) {
        RUNNING.set(std::ptr::null());
        if let Some(coroutine) = self.coroutine.as_mut() {
            coroutine.force_unwind();
            self.keep_stack();
        }
    }
}

impl fmt::Debug for Fiber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fiber").field("ended", &self.coroutine.is_none()).finish_non_exhaustive()
    }
}

/// Lets others run. Does nothing outside fibers.
pub fn suspend() {
    let running = RUNNING.get();
    if running.is_null() {
        return;
    }
    // SAFETY: the pointer is that of the fiber that runs now, set when it began or was resumed, and its switch lives on its
    // stack as long as it runs.
    unsafe { (*running).suspend(()) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fibers_take_turns_and_drop_what_they_hold_when_they_crash() {
        let told = Rc::new(RefCell::new(Vec::new()));
        let fiber = |name: &'static str| {
            let told = Rc::clone(&told);
            Fiber::new(move || {
                for turn in 0..2 {
                    told.borrow_mut().push((name, turn));
                    suspend();
                }
            })
        };
        let (mut a, mut b) = (fiber("a"), fiber("b"));
        assert!(!a.resume() && !b.resume());
        drop(a);
        assert!(!b.resume() && b.resume());
        assert_eq!(*told.borrow(), [("a", 0), ("b", 0), ("b", 1)]);
        drop(b);
        assert_eq!(Rc::strong_count(&told), 1);
    }
}
