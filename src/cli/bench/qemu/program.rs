//! The guest of the QEMU measurements: a hundred bytes for QEMU's multiboot loader, no files needed. It
//! does what single bytes on its serial port tell it, and otherwise waits:
//!
//! ```text
//!   n0123..    the number of pages of its working set, in decimal
//!   s          writes a word of each of them, then answers "s"
//!   p          answers "p"
//!   t          says "t" again and again from now on, and listens no more
//! ```
//!
//! It says "!" when it has started. 32 bits, flat memory, no interrupts, no stack. Its working set
//! begins at 16 MiB.

const LOADED_AT: u32 = 0x10_0000;
const HEADER_BYTES: u32 = 32;
/// Of the file: as much as a loader may want to see of it.
const BYTES: u32 = 4096;

const MAGIC: u32 = 0x1bad_b002;
/// The header says where to load and to start.
const ADDRESSES: u32 = 0x1_0000;

#[rustfmt::skip]
const CODE: &[u8] = &[
    0xfa, // cli
    0x66, 0xba, 0xf8, 0x03, // mov dx, 3f8
    0xb0, 0x21, // mov al, '!'
    0xee, // out dx, al
    // wait:
    0x66, 0xba, 0xfd, 0x03, // mov dx, 3fd
    0xec, // in al, dx
    0xa8, 0x01, // test al, 1
    0x75, 0x0c, // jnz ready
    0xb9, 0xf4, 0x01, 0x00, 0x00, // mov ecx, 500
    // idle:
    0xf3, 0x90, // pause
    0x49, // dec ecx
    0x75, 0xfb, // jnz idle
    0xeb, 0xeb, // jmp wait
    // ready:
    0x66, 0xba, 0xf8, 0x03, // mov dx, 3f8
    0xec, // in al, dx
    0x3c, 0x70, // cmp al, 'p'
    0x74, 0x2f, // je answer
    0x3c, 0x74, // cmp al, 't'
    0x74, 0x2e, // je talk
    0x3c, 0x73, // cmp al, 's'
    0x74, 0x14, // je sweep
    0x3c, 0x6e, // cmp al, 'n'
    0x74, 0x0c, // je clear
    0x2c, 0x30, // sub al, '0'
    0x0f, 0xb6, 0xc0, // movzx eax, al
    0x6b, 0xed, 0x0a, // imul ebp, ebp, 10
    0x01, 0xc5, // add ebp, eax
    0xeb, 0xca, // jmp wait
    // clear:
    0x31, 0xed, // xor ebp, ebp
    0xeb, 0xc6, // jmp wait
    // sweep:
    0x89, 0xe9, // mov ecx, ebp
    0xbf, 0x00, 0x00, 0x00, 0x01, // mov edi, 1000000
    0x43, // inc ebx
    // page:
    0x89, 0x1f, // mov [edi], ebx
    0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi, 1000
    0x49, // dec ecx
    0x75, 0xf5, // jnz page
    // answer:
    0xee, // out dx, al
    0xeb, 0xb0, // jmp wait
    // talk:
    0xee, // out dx, al
    0xb9, 0xf4, 0x01, 0x00, 0x00, // mov ecx, 500
    // rest:
    0xf3, 0x90, // pause
    0x49, // dec ecx
    0x75, 0xfb, // jnz rest
    0xeb, 0xf3, // jmp talk
];

/// The program as a file for `-kernel`.
pub(super) fn image() -> Vec<u8> {
    let end = LOADED_AT + BYTES;
    let header: [u32; 8] = [
        MAGIC,
        ADDRESSES,
        // All three together are zero.
        0u32.wrapping_sub(MAGIC + ADDRESSES),
        // Where the header is, where the file begins, ends, where its zeros end, its first instruction.
        LOADED_AT,
        LOADED_AT,
        end,
        end,
        LOADED_AT + HEADER_BYTES,
    ];
    let mut image: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    image.extend(CODE);
    image.resize(BYTES as usize, 0);
    image
}
