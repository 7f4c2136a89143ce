/* Included first by bcc. What a UAPI-only program needs of the kernel's own headers. */
#ifndef SIDECAR_KCONFIG_H
#define SIDECAR_KCONFIG_H
#define CONFIG_BPF_SYSCALL 1
#ifndef PAGE_SIZE
#define PAGE_SIZE 4096
#endif
#ifndef NULL
#define NULL ((void *)0)
#endif
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char s8;
typedef short s16;
typedef int s32;
typedef long long s64;
typedef _Bool bool;
typedef unsigned long size_t;
typedef unsigned long uintptr_t;
#endif
