//! The functions that the program would call if this library were not there: those of the next library that has them,
//! usually libc, looked up once. While that goes on, libc's allocator serves by its internal names.

use std::ffi::{CStr, c_void};
use std::mem::transmute;
use std::sync::atomic::{AtomicPtr, AtomicU8, Ordering};

use libc::pid_t;

use crate::own;

/// The functions of the next library.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Next {
    pub(crate) malloc: unsafe extern "C" fn(usize) -> *mut c_void,
    pub(crate) calloc: unsafe extern "C" fn(usize, usize) -> *mut c_void,
    pub(crate) realloc: unsafe extern "C" fn(*mut c_void, usize) -> *mut c_void,
    pub(crate) memalign: unsafe extern "C" fn(usize, usize) -> *mut c_void,
    pub(crate) free: unsafe extern "C" fn(*mut c_void),
    pub(crate) usable: Option<unsafe extern "C" fn(*mut c_void) -> usize>,
    pub(crate) trim: Option<unsafe extern "C" fn(usize) -> i32>,
    pub(crate) mallinfo2: Option<unsafe extern "C" fn() -> libc::mallinfo2>,
    pub(crate) fork: Option<unsafe extern "C" fn() -> pid_t>,
    pub(crate) plain_fork: Option<unsafe extern "C" fn() -> pid_t>,
    pub(crate) pthread_create: Option<PthreadCreate>,
}

type PthreadCreate = unsafe extern "C" fn(
    *mut libc::pthread_t,
    *const libc::pthread_attr_t,
    unsafe extern "C" fn(*mut c_void) -> *mut c_void,
    *mut c_void,
) -> i32;

/// By libc's internal names.
const INTERNAL: Next = Next {
    malloc: own::__libc_malloc,
    calloc: own::__libc_calloc,
    realloc: own::__libc_realloc,
    memalign: own::__libc_memalign,
    free: own::__libc_free,
    usable: None,
    trim: None,
    mallinfo2: None,
    fork: None,
    plain_fork: None,
    pthread_create: None,
};

const UNKNOWN: u8 = 0;
const LOOKING: u8 = 1;
const KNOWN: u8 = 2;

static STATE: AtomicU8 = AtomicU8::new(UNKNOWN);
static FOUND: AtomicPtr<Next> = AtomicPtr::new(std::ptr::null_mut());

/// The next functions. The first call looks them up; calls meanwhile, this thread's too, get libc's.
pub(crate) fn next() -> &'static Next {
    let found = FOUND.load(Ordering::Acquire);
    if found.is_null() {
        return look_up();
    }
    // SAFETY: set once, to a value that is never freed.
    unsafe { &*found }
}

#[cold]
fn look_up() -> &'static Next {
    if STATE.compare_exchange(UNKNOWN, LOOKING, Ordering::AcqRel, Ordering::Acquire).is_err() {
        return &INTERNAL;
    }
    // SAFETY: each symbol has the type of its field, as libc declares it.
    let found = unsafe {
        Next {
            malloc: symbol(c"malloc").map_or(INTERNAL.malloc, |f| transmute(f)),
            calloc: symbol(c"calloc").map_or(INTERNAL.calloc, |f| transmute(f)),
            realloc: symbol(c"realloc").map_or(INTERNAL.realloc, |f| transmute(f)),
            memalign: symbol(c"memalign").map_or(INTERNAL.memalign, |f| transmute(f)),
            free: symbol(c"free").map_or(INTERNAL.free, |f| transmute(f)),
            usable: symbol(c"malloc_usable_size").map(|f| transmute(f)),
            trim: symbol(c"malloc_trim").map(|f| transmute(f)),
            mallinfo2: symbol(c"mallinfo2").map(|f| transmute(f)),
            fork: symbol(c"fork").map(|f| transmute(f)),
            plain_fork: symbol(c"_Fork").map(|f| transmute(f)),
            pthread_create: symbol(c"pthread_create").map(|f| transmute(f)),
        }
    };
    // Never freed; this library's own memory does not come from the functions that are being looked up.
    let found: &'static Next = Box::leak(Box::new(found));
    FOUND.store(std::ptr::from_ref(found).cast_mut(), Ordering::Release);
    STATE.store(KNOWN, Ordering::Release);
    found
}

fn symbol(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: a name that ends with a zero, and a handle that is a constant.
    let found = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}
