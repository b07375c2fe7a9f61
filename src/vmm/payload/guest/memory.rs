//! The memory functions that compiled code calls and that a C library would bring.

/// Copies `bytes` bytes between areas that do not overlap.
///
/// # Safety
/// Both areas are valid for that many bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(target: *mut u8, source: *const u8, bytes: usize) -> *mut u8 {
    // SAFETY: the caller vouches for both areas; the direction flag is clear by the C ABI.
    unsafe {
        core::arch::asm!(
            "rep movsb",
            inout("rdi") target => _,
            inout("rsi") source => _,
            inout("rcx") bytes => _,
            options(nostack, preserves_flags),
        );
    }
    target
}

/// Fills `bytes` bytes with the low byte of `value`.
///
/// # Safety
/// The area is valid for that many bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(target: *mut u8, value: i32, bytes: usize) -> *mut u8 {
    // SAFETY: the caller vouches for the area; the direction flag is clear by the C ABI.
    unsafe {
        core::arch::asm!(
            "rep stosb",
            inout("rdi") target => _,
            in("al") value as u8,
            inout("rcx") bytes => _,
            options(nostack, preserves_flags),
        );
    }
    target
}

/// Compares `bytes` bytes: negative, zero or positive as the first difference is.
///
/// # Safety
/// Both areas are valid for that many bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    let mut at = 0;
    while at < bytes {
        // SAFETY: `at` is within both areas. Volatile keeps the loop from becoming a memcmp.
        let (l, r) = unsafe { (left.add(at).read_volatile(), right.add(at).read_volatile()) };
        if l != r {
            return i32::from(l) - i32::from(r);
        }
        at += 1;
    }
    0
}

/// As `memcmp`, for compilers that only ask whether there is a difference.
///
/// # Safety
/// Both areas are valid for that many bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    // SAFETY: the caller vouches for both areas.
    unsafe { memcmp(left, right, bytes) }
}
