// The compiled CUDA kernels, embedded as bytes.
asm(".section .rodata\n"
    ".balign 64\n"
    ".global lsp_fatbin\n"
    ".hidden lsp_fatbin\n"
    "lsp_fatbin:\n"
    ".incbin \"" LORASERVE_FATBIN
    "\"\n"
    ".previous\n");
