#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rempart_repository::fuzz::log_object(data));
