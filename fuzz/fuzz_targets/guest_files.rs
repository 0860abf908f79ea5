#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rempart_guest_fs::fuzz::guest_files(data));
